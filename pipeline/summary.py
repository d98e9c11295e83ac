"""The figures of a stage as a person reads them at its end."""

from typing import Any


def summary_table(stage: str, summary: dict[str, Any]) -> str:
    """The figures of a stage as aligned lines."""
    flat = {f"{stage}": ""}
    for key, value in summary.items():
        if isinstance(value, dict):
            flat |= {f"  {key}  {k}": v for k, v in value.items() if _is_shown(k, v)}
        elif not isinstance(value, list):
            flat[f"  {key}"] = value
    width = max(len(key) for key in flat)
    return "\n".join(f"{key:{width}}  {_figure(value)}".rstrip() for key, value in flat.items())


def _is_shown(name: str, value: Any) -> bool:
    """Whether a line says anything: no reasons and the like, and no rows of a kind that there were none of."""
    return not isinstance(value, dict | list) and not (name.startswith("rows_") and value == 0)


def _figure(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
