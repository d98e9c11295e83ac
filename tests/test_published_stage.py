"""An SAE that SAELens wrote, in the place of training, through every command."""

import json
from pathlib import Path

import numpy as np
import pytest
import sae_lens
import torch
from conftest import contents, only, pipeline
from sae_lens import StandardSAEConfig
from test_published import D, F, HOOK, NAME, edit_cfg, write_theirs

from evaluate.figures import read_figures

SETTINGS = ("train=null", "published.path=theirs", "sample.train_tokens=0", "published.exclude.token_ids=[1]")


@pytest.fixture(scope="module")
def published(finished, tmp_path_factory) -> Path:
    """A finished run of an SAE of SAELens on the tiny settings; read only."""
    import shutil

    folder = tmp_path_factory.mktemp("published")
    shutil.copytree(finished / "assets", folder / "assets")
    write_theirs(folder / "theirs", StandardSAEConfig(d_in=D, d_sae=F, apply_b_dec_to_input=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ran = pipeline("run", *SETTINGS)
        assert ran.status == 0, ran.out
        print(ran.out)
    return folder


def test_it_runs(published):
    assert 1
