"""The map step of the demo: called with one batch of rows at a time."""

import pandas as pd

NOW = pd.Timestamp("2024-06-01", tz="UTC")


def build(frame: pd.DataFrame) -> pd.DataFrame:
    """Add the derived features that the model was trained with."""
    days = (NOW - frame["last_login"]).dt.total_seconds() / 86400
    return frame.assign(
        days_since_login=days.astype("float32"),
        charge_per_month=(frame["monthly_charges"] / (frame["tenure_months"] + 1)).astype("float32"),
    )
