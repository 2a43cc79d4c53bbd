"""Whether a checkpoint can be gone on from is known from the names of its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rollout.errors import UserError
from training.layout import Layout, check_resumable, saved, wanted

FILES = {
    "replicated": ["optimizer.pt"],
    "zero1": [
        "latest",
        "global_step4/mp_rank_00_model_states.pt",
        "global_step4/zero_pp_rank_1_mp_rank_00_optim_states.pt",
    ],
    "zero3": [
        "latest",
        "global_step4/zero_pp_rank_0_mp_rank_00_model_states.pt",
        "global_step4/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
    ],
    "deepspeed": ["latest", "global_step4/mp_rank_00_model_states.pt"],
    "fsdp": ["pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata"],
}


def checkpoint(folder: Path, kind: str, processes: int) -> Path:
    states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{i}.pth" for i in range(processes)]
    for name in [*FILES[kind], *states]:
        path = folder / "step-4" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder / "step-4"


@pytest.mark.parametrize("processes", [1, 2, 16])
@pytest.mark.parametrize("kind", FILES)
def test_a_checkpoint_shows_what_saved_it(kind: str, processes: int, tmp_path: Path) -> None:
    assert saved(checkpoint(tmp_path, kind, processes)) == Layout(kind, processes)


@pytest.mark.parametrize(
    ("trainer", "kind"),
    [
        ({}, "replicated"),
        ({"fsdp": True, "fsdp_config": {"version": 2}}, "fsdp"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "zero1"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "zero3"),
        ({"deepspeed": {"gradient_clipping": 1.0}}, "deepspeed"),
    ],
)
def test_settings_show_how_a_run_is_cut(trainer: dict[str, object], kind: str) -> None:
    assert wanted(trainer, 2) == Layout(kind, 2)


def test_a_file_of_deepspeed_settings_is_read(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    assert wanted({"deepspeed": str(tmp_path / "ds.json")}, 4) == Layout("zero3", 4)


@pytest.mark.parametrize("kind", ["replicated", "fsdp", "deepspeed"])
def test_what_is_whole_or_cut_by_names_goes_on_with_any_number_of_processes(kind: str, tmp_path: Path) -> None:
    check_resumable(checkpoint(tmp_path, kind, 2), Layout(kind, 1))


@pytest.mark.parametrize("kind", ["zero1", "zero3"])
@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 2), (8, 4)])
def test_deepspeeds_states_want_as_many_processes(kind: str, before: int, now: int, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, kind, before)
    check_resumable(folder, Layout(kind, before))
    with pytest.raises(UserError) as refused:
        check_resumable(folder, Layout(kind, now))
    assert str(refused.value) == (
        f"resume: {folder} was saved by {before} processes and this run has {now}, but DeepSpeed cannot cut optimizer "
        f"states anew; resume with --nproc-per-node {before}, or start another run_dir from its weights alone "
        f"(model=hf model.path={folder})"
    )


@pytest.mark.parametrize("kind", FILES)
def test_another_sharding_is_refused_with_the_one_that_goes_on(kind: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, kind, 2)
    for other in FILES:
        if other != kind:
            with pytest.raises(UserError, match=rf"^sharding: {folder} holds optimizer states of sharding=.*; resume"):
                check_resumable(folder, Layout(other, 2))


def test_an_optimizer_on_cpus_goes_on_with_its_own_states_only(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "zero3", 2)
    part = folder / "global_step4" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    offload = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    run = wanted({"deepspeed": {"zero_optimization": offload}}, 2)
    torch.save({"ds_config": {"zero_optimization": {"stage": 3}}}, part)
    with pytest.raises(
        UserError, match=r"saved without offload_optimizer, .* resume without it \(sharding=zero3\), or"
    ):
        check_resumable(folder, run)
    torch.save({"ds_config": {"zero_optimization": offload}}, part)
    check_resumable(folder, run)
    check_resumable(folder, wanted({"deepspeed": {"zero_optimization": {"stage": 3}}}, 2))
