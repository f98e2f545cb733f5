"""A Parquet file with an encrypted column: reading its metadata ends a process (seen in pyarrow 26)."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def write_encrypted_columns(path: Path) -> Path:
    """Write a file whose footer can be read, and whose column ``x`` is encrypted."""
    from pyarrow.parquet import encryption  # some builds of pyarrow have none

    class Client(encryption.KmsClient):  # type: ignore[misc]
        def wrap_key(self, key: bytes, name: str) -> bytes:
            return key

        def unwrap_key(self, key: bytes, name: str) -> bytes:
            return key

    config = encryption.EncryptionConfiguration(
        footer_key="footer", column_keys={"column": ["x"]}, plaintext_footer=True, double_wrapping=False
    )
    factory = encryption.CryptoFactory(lambda connection: Client())
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), config)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"id": pa.array(range(10), pa.int64()), "x": pa.array(range(10), pa.float64())})
    with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    return path
