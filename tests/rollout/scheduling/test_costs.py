"""Step costs against numbers worked out by hand, and what must hold whatever the step."""

import dataclasses

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.errors import UserError
from rollout.hydra import conf_dir, to_object
from rollout.scheduling import config
from rollout.scheduling.costs import Linear, Roofline, Work, h100_8b, h100x4_70b

WORK = st.builds(
    Work,
    rounds=st.integers(1, 16),
    prefill=st.integers(0, 8192),
    decode=st.integers(0, 256),
    prefill_context=st.integers(0, 10**9),
    decode_context=st.integers(0, 10**7),
    read=st.integers(0, 400_000),
    running=st.integers(0, 256),
    loaded=st.integers(0, 100_000),
)


def test_a_decode_is_bound_by_memory():
    # 16 GB of weights and 20,000 x 131 kB of cache at 2.7 TB/s, plus 1.5 ms
    work = Work(decode=2, decode_context=20_000, read=20_000, running=2)
    assert h100_8b().seconds(work) == pytest.approx((16e9 + 2.62e9) / 2.7e12 + 1.5e-3)


def test_a_prefill_is_bound_by_compute():
    # 8,192 tokens from nothing: 131 TFLOP, and 0.52 MFLOP x 8192 x 8193 / 2 of attention
    work = Work(prefill=8192, prefill_context=8192 * 8193 / 2, read=8192, running=1)
    assert h100_8b().seconds(work) == pytest.approx((8192 * 16e9 + 0.52e6 * 33_558_528) / 500e12 + 1.5e-3)


def test_rounds_share_the_prefill_and_read_everything_again():
    one = Work(prefill=1000, prefill_context=500_000, decode=1, decode_context=8000, read=9000, running=2)
    spread = dataclasses.replace(
        one, rounds=4, prefill=4000, prefill_context=2_000_000, decode=4, decode_context=32_000
    )
    for cost in (h100_8b(), h100x4_70b()):
        assert cost.seconds(spread) == pytest.approx(4 * cost.seconds(one))


def test_cheap_prefill_scales_prompts_alone():
    prompt = Work(prefill=8192, prefill_context=1e7, read=8192, running=1)
    answer = Work(decode=64, decode_context=640_000, read=640_000, running=64)
    cheap, dear = h100_8b(prefill_scale=0.25), h100_8b()
    assert cheap.seconds(prompt) - 1.5e-3 == pytest.approx((dear.seconds(prompt) - 1.5e-3) / 4)
    assert cheap.seconds(answer) == dear.seconds(answer)


def test_the_tier_costs_its_bytes_over_pcie():
    work = Work(prefill=100, read=100, running=1)
    loaded = dataclasses.replace(work, loaded=10_000)
    assert h100_8b().seconds(loaded) - h100_8b().seconds(work) == pytest.approx(10_000 * 131e3 / 25e9)


def test_70b_on_four_is_a_quarter_of_the_model_a_gpu():
    share = h100x4_70b()
    assert share.weight_bytes * 4 == 140e9
    assert share.kv_bytes * 4 == pytest.approx(80 * 8 * 128 * 2 * 2, rel=2e-3)  # layers, heads, width, K and V, bytes
    assert share.attention_flops * 4 == pytest.approx(80 * 8192 * 4, rel=1e-2)


def test_a_fitted_engine():
    cost = Linear(a=0.01, b=0.001, c=1e-6, d=0.002, load=1e-4)
    work = Work(rounds=2, prefill=100, prefill_context=5050, decode=6, running=4, loaded=10)
    assert cost.seconds(work) == pytest.approx(2 * (0.01 + 0.008) + 0.1 + 0.00505 + 0.001)


@settings(max_examples=50, deadline=None)
@given(WORK, st.sampled_from([f.name for f in dataclasses.fields(Work)]), st.integers(1, 1000))
def test_more_work_never_takes_less(work, name, more):
    larger = dataclasses.replace(work, **{name: getattr(work, name) + more})
    for cost in (h100_8b(), h100x4_70b(), Linear(c=1e-9, load=1e-6)):
        assert cost.seconds(larger) >= cost.seconds(work) > 0


@pytest.mark.parametrize("name, value", [("peak", 0), ("bandwidth", -1), ("overhead", float("nan")), ("pcie", 0)])
def test_impossible_hardware_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"hardware.{name}"):
        h100_8b(**{name: value})
    with pytest.raises(UserError, match=r"hardware\.a"):
        Linear(a=-1)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("h100_8b", h100_8b()),
        ("h100_8b_cheap_prefill", h100_8b(prefill_scale=0.25)),
        ("h100x4_70b", h100x4_70b()),
        ("cpu", Linear(a=0.0174, b=4.87e-4, c=1.5e-7, d=4.56e-3)),
    ],
)
def test_the_configuration_holds_the_same_numbers(name, expected):
    config.register()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        composed = to_object(compose("simulator", overrides=["run_dir=unused", f"hardware={name}"]))
    assert composed.hardware == expected and isinstance(composed.hardware, Roofline | Linear)
