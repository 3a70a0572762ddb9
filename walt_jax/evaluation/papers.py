"""Published scores, as the papers' own tables have them, by the protocol that they go with."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Published:
    """A number in a paper.

    Attributes:
      model: its name, with the number of parameters where it is given.
      name: of the score.
      value, std: as printed; std None where none is.
      protocol: the one that it was taken by, as far as is known.
      source: paper and table.
    """

    model: str
    name: str
    value: float
    std: float | None
    protocol: str
    source: str


_WALT = "2312.06662, table 1"
_ZERO = "2312.06662, table 5; its protocol is not published"
PUBLISHED = (
    Published("W.A.L.T-XL (460M)", "fvd", 36, 2, "magvit_ucf101", _WALT),
    Published("W.A.L.T-L (313M)", "fvd", 46, 2, "magvit_ucf101", _WALT),
    Published("MAGVIT-v2 (307M)", "fvd", 58, 3, "magvit_ucf101", "2310.05737, table 1"),
    Published("MAGVIT", "fvd", 76, 2, "magvit_ucf101", "2310.05737, table 1"),
    Published("TATS", "fvd", 332, 18, "magvit_ucf101", _WALT),
    Published("MAGVIT-v2 tokenizer", "rfvd", 8.62, None, "magvit_ucf101", "2310.05737, table 5c"),
    Published("MAGVIT-L tokenizer", "rfvd", 25, None, "magvit_ucf101", "2212.05199, table 7"),
    Published("W.A.L.T-L (313M)", "fvd", 3.3, 0.0, "magvit_k600", _WALT),
    Published("MAGVIT-v2 (307M)", "fvd", 4.3, 0.1, "magvit_k600", "2310.05737, table 1"),
    Published("MAGVIT", "fvd", 9.9, 0.3, "magvit_k600", "2310.05737, table 1"),
    Published("RIN", "fvd", 10.8, None, "magvit_k600", _WALT),
    Published("Video Diffusion", "fvd", 16.2, 0.3, "magvit_k600", _WALT),
    Published("TrIVD-GAN-FP", "fvd", 25.7, 0.7, "magvit_k600", _WALT),
    Published("Phenaki", "fvd", 36.4, 0.2, "magvit_k600", _WALT),
    Published("W.A.L.T (3B)", "fvd", 258.1, None, "videopoet_zeroshot_ucf", _ZERO),
    Published("PYoCo", "fvd", 355.2, None, "videopoet_zeroshot_ucf", _ZERO),
    Published("Make-A-Video", "fvd", 367.2, None, "videopoet_zeroshot_ucf", _ZERO),
    Published("Video LDM", "fvd", 550.6, None, "videopoet_zeroshot_ucf", _ZERO),
)
