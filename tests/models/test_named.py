"""Published numbers of parameters, and the command that lists them."""

import json

from walt_jax.models.__main__ import main


def test_published_parameter_counts(capsys):
    main(["--json"])
    counts = json.loads(capsys.readouterr().out)
    assert {name: parts["total"] for name, parts in counts.items()} == {
        "tokenizer-walt": 375_829_131,  # 375.8M with 8 channels
        "tokenizer-walt-2d": 112_971_915,
        "tokenizer-walt-imagenet": 103_331_083,  # 103.3M with multipliers (1, 1, 2, 4)
        "tokenizer-magvit2": 376_003_221,  # 376.0M with 18 channels
        "tokenizer-magvit2-2d": 113_053_845,  # 113.1M
        "discriminator-magvit2": 61_341_569,  # 61.3M in the code's order
        "discriminator-magvit2-figure": 67_977_473,  # 68.0M in the figure's
        "discriminator-imagenet": 73_924_481,
    }
    magvit2 = counts["tokenizer-magvit2"]
    assert round(magvit2["encoder"] / 1e6, 1) == 150.3
    assert round(magvit2["decoder"] / 1e6, 1) == 225.7
