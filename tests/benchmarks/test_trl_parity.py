from benchmarks.trl_parity import QUICK, compare


def test_two_arms_equal_trl():
    rows = compare(QUICK, seeds=1, note=print)
    assert [row["loss"] for row in rows] == ["grpo", "dapo"]
    for row in rows:
        assert row["size"] > 0.01
        assert row["loss_difference"] <= 1e-6
        assert row["gradient_difference"] <= 1e-5
        assert row["advantage_difference"] <= 1e-5
        assert row["clipped_share"] >= 0.1
