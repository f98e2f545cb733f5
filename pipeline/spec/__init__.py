"""The job spec: its parts, parameters, YAML with line numbers, and every issue in plain words."""
