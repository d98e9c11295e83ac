"""The figures of a stage as a person reads them at its end."""

from typing import Any


def summary_table(stage: str, summary: dict[str, Any]) -> str:
    """The figures of a stage as aligned lines."""
    flat = {f"{stage}": ""}
    for key, value in summary.items():
        if isinstance(value, dict):
            flat |= {f"  {key}  {k}": v for k, v in value.items() if not isinstance(v, dict | list)}
        elif not isinstance(value, list):
            flat[f"  {key}"] = value
    width = max(len(key) for key in flat)
    return "\n".join(f"{key:{width}}  {_figure(value)}".rstrip() for key, value in flat.items())


def _figure(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
