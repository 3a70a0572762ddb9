"""What the samples of a protocol are to show: sample i's class, text and first frames."""

import hashlib

import numpy as np

from walt_jax.errors import UserError
from walt_jax.evaluation.clips import Clips
from walt_jax.evaluation.evaluators import Sampling
from walt_jax.evaluation.protocols import Protocol
from walt_jax.evaluation.scores import Record
from walt_jax.generation import Generator
from walt_jax.generation.sources import read_prompts
from walt_jax.tasks import Wanted
from walt_jax.tasks.captions import Text

_LABELS, _ORDER = 7, 8  # tags of the random draws of classes, and of the clips that are continued


class Wishes:
    """Asked for samples of given numbers, says what they are to show; a function of the seed.

    Attributes:
      labels: int (total,), the class of each sample; None for a model without.
      texts: prompts of the samples, in turn; none for a model without.
      record: what of it belongs into a score's record.
    """

    def __init__(
        self, generator: Generator, protocol: Protocol, real: Clips | None, sampling: Sampling
    ) -> None:
        """Refuses what the model or the real clips cannot give.

        Raises:
          UserError: the protocol needs real clips where statistics are given, their classes are
            others, or the model takes no given frames.
        """
        task, total = generator.task, protocol.total_samples
        if task.model.upsampling is not None:
            raise UserError(
                "A super-resolution model is not scored alone: sample through both, and score the "
                "folder by `evaluate fvd`."
            )
        self._generator, self._protocol, self._real = generator, protocol, real
        self._seed, self.labels, self.texts = sampling.seed, None, ()
        self.record: Record = {}
        if classes := task.model.num_classes:
            self.labels = self._draw_labels(classes, total)
        if task.text is not None:
            self.texts = prompts = self._prompts(sampling.prompts)
            task.text.tokenize(prompts)  # refuses a long one
            digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]
            self.record["prompts"] = {"count": len(prompts), "sha256": digest}
        if protocol.given_frames:
            if task.model.given == "none":
                raise UserError(
                    f"The protocol {protocol.name} gives {protocol.given_frames} frames, but this "
                    "model was built with given='none': choose another, or "
                    "--protocol.given_frames=0."
                )
            clips = self._clips("gives real frames")
            size = generator.video_shape[1:]
            self._given = generator.tokenizer.config.latent_shape(protocol.given_frames, *size)[0]
            rng = np.random.default_rng((sampling.seed, _ORDER))
            self._order = rng.permutation(len(clips))

    def __call__(self, numbers: np.ndarray) -> Wanted:
        """Of samples `numbers` (B,)."""
        given = mask = None
        if self._protocol.given_frames:
            given, mask = self._first_frames(numbers)
        return Wanted(
            label=None if self.labels is None else self.labels[numbers],
            text=self._said(numbers) if self.texts else None,
            given=given,
            given_mask=mask,
        )

    def _said(self, numbers: np.ndarray) -> Text:
        """A batch at a time: embeddings of all would be large."""
        return self._generator.texts([self.texts[n % len(self.texts)] for n in numbers])

    def _draw_labels(self, classes: int, total: int) -> np.ndarray:
        if self._protocol.labels == "even":
            return np.resize(np.arange(classes, dtype=np.int32), total)
        real = self._clips("takes the real clips' classes").labels
        if real.min() < 0 or real.max() >= classes:
            raise UserError(
                f"The real videos have classes {real.min()} to {real.max()}, but this model has 0 "
                f"to {classes - 1}: give the prepared data of its training as --real, or "
                "--protocol.labels=even."
            )
        return np.random.default_rng((self._seed, _LABELS)).choice(real, total).astype(np.int32)

    def _prompts(self, file: str) -> list[str]:
        if file:
            prompts = read_prompts(file)
        else:
            clips = self._clips("takes the real clips' captions")
            prompts = [clips.caption(i) for i in range(len(clips))]
        if not any(prompts):
            raise UserError("There is no prompt for the samples: give a file of them as --prompts.")
        return prompts

    def _clips(self, why: str) -> Clips:
        if self._real is None:
            raise UserError(
                f"The protocol {self._protocol.name} {why}: give the videos as --real, not "
                "statistics."
            )
        return self._real

    def _first_frames(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Latents (B, T, H, W, C), zero but for those of the given frames, and which they are."""
        t, h, w = self._generator.task.model.grid
        channels = self._generator.task.model.latent_channels
        given = np.zeros((len(numbers), t, h, w, channels), np.float32)
        mask = np.zeros((len(numbers), t, h, w), bool)
        mask[:, : self._given] = True
        rows = self._order[numbers % len(self._order)]
        clips = np.stack([self._real.read(int(row)) for row in rows])
        frames = clips[:, : self._protocol.given_frames]
        given[:, : self._given] = self._generator.encode(frames)
        return given, mask
