"""Templates that let systemd, cron or Kubernetes run the server."""

from __future__ import annotations

import shlex
from collections.abc import Callable

import yaml

NAME = "pipeline-serve"


def systemd_unit(*, python: str, arguments: tuple[str, ...], folder: str) -> str:
    """A unit for ``~/.config/systemd/user`` or ``/etc/systemd/system``.

    Only the server itself is ended with the unit: its drivers go on, and the next server finds them.
    """
    command = shlex.join([python, "-m", "pipeline", "serve", *arguments])
    return f"""\
# Save as ~/.config/systemd/user/{NAME}.service, then:
#   systemctl --user daemon-reload && systemctl --user enable --now {NAME} && loginctl enable-linger
[Unit]
Description=Runs queued batch inference jobs
After=network-online.target
StartLimitIntervalSec=0

[Service]
Type=exec
WorkingDirectory={folder}
ExecStart={command}
Restart=on-failure
RestartSec=10
# The drivers of jobs are to outlive the server.
KillMode=process
TimeoutStopSec=30

[Install]
WantedBy=default.target
"""


def cron_table(*, python: str, arguments: tuple[str, ...], folder: str) -> str:
    """A line for ``crontab -e``: one round every minute, in which drivers are started that go on by themselves."""
    command = shlex.join([python, "-m", "pipeline", "serve", "--once", *arguments])
    # In a crontab a percent sign is a line break.
    line = f"cd {shlex.quote(folder)} && {command}".replace("%", r"\%")
    return f"""\
# Add with: crontab -e
* * * * * {line} >> .pipeline-serve.log 2>&1
"""


def kubernetes_manifests(*, python: str, arguments: tuple[str, ...], folder: str) -> str:
    """A Deployment of one server, and, for who would rather not have one, a CronJob that does a round a minute.

    In a container a driver lives no longer than its pod: the next pod goes on with what was killed, from its
    checkpoints. The pod of the CronJob stays until the jobs that it started have ended.
    """
    serve = [python, "-m", "pipeline", "serve", *arguments]
    server = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": NAME},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": {"app": NAME}},
            "template": {
                "metadata": {"labels": {"app": NAME}},
                "spec": {
                    "containers": [_container(serve, folder)],
                    "volumes": _volumes(),
                },
            },
        },
    }
    rounds = {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": {"name": f"{NAME}-once"},
        "spec": {
            "schedule": "* * * * *",
            "concurrencyPolicy": "Forbid",
            "jobTemplate": {
                "spec": {
                    "backoffLimit": 0,
                    "template": {
                        "spec": {
                            "restartPolicy": "Never",
                            "containers": [_container([*serve, "--once", "--wait"], folder)],
                            "volumes": _volumes(),
                        }
                    },
                }
            },
        },
    }
    head = "# Put in your image and the claim that holds the job directories, and keep one of the two.\n"
    return head + yaml.safe_dump_all([server, rounds], sort_keys=False)


def _container(command: list[str], folder: str) -> dict[str, object]:
    return {
        "name": "serve",
        "image": "registry.example/pipeline:latest",
        "command": command,
        "workingDir": folder,
        "volumeMounts": [{"name": "jobs", "mountPath": folder}],
    }


def _volumes() -> list[dict[str, object]]:
    return [{"name": "jobs", "persistentVolumeClaim": {"claimName": "pipeline-jobs"}}]


TEMPLATES: dict[str, Callable[..., str]] = {
    "systemd": systemd_unit,
    "cron": cron_table,
    "kubernetes": kubernetes_manifests,
}
