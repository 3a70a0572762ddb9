"""At least 200 faults, and every loss is the undisturbed run's, bit for bit."""

import chaos
import pytest

FAULTS = {2: 150, 4: 54}  # by the number of processes


@pytest.mark.slow
@pytest.mark.parametrize("processes", list(FAULTS))
def test_every_loss_is_the_undisturbed_runs(tmp_path, processes):
    campaign, faults = chaos.Campaign(tmp_path, processes), FAULTS[processes]
    rows, straight = campaign.run(chaos.plan(faults, processes))
    assert sum(campaign.counts.values()) >= faults
    assert campaign.counts.keys() == chaos.WEIGHTS.keys() and campaign.passed_over
    wrong = [row for row in rows if straight[row[0]] != list(row[1:])]
    assert not wrong
    steps = {step for step, *_ in rows}
    assert steps == set(range(1, max(steps) + 1))  # none lost
    assert len(rows) > len(steps)  # some were done again, and came out the same
