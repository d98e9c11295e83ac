"""The figures of a complete evaluation, or of one with explanations, for the model card, `compare` and `push`."""

from evaluate.figures import FILE, Evaluation, read_figures
from harvest.files import UserError
from harvest.stage_directory import Run


def read_evaluation(run: Run) -> Evaluation:
    """The figures of a complete evaluation.

    Raises UserError when they are damaged, or belong to another run.
    """
    manifest = run.manifest
    if run.changed(only=FILE):
        raise UserError(f"{run.said([FILE])}; restore it, or {run.way_out}")
    found = read_figures(run.path)
    upstream = run.upstreams[0]
    trained = found.inputs.get(upstream.stage)
    if found.fingerprint != manifest["fingerprint"] or trained != upstream.path.name:
        raise UserError(
            f"{run.path / FILE}: holds the figures of another run ({found.fingerprint or trained}), not of "
            f"{manifest['fingerprint']}; restore it, or {run.way_out}"
        )
    return found
