"""Captions from an OpenAI-compatible vision endpoint; kept on disk, so that none is paid twice."""

import base64
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import requests
import requests.adapters
import urllib3

from walt_jax.data.curation.config import KEY, URL, EndpointConfig
from walt_jax.data.curation.cutting import Clip
from walt_jax.errors import UserError

_RETRIED = (408, 409, 429, 500, 502, 503, 504)
_REFUSED = (400, 413, 422)  # of these frames, not of the endpoint


@dataclasses.dataclass(frozen=True)
class Caption:
    """An answer.

    Attributes:
      text: the caption, "" where the endpoint refused the frames.
      refusal: what it said then.
    """

    text: str
    refusal: str = ""


class Captioner:
    """Asks an endpoint for captions, `concurrency` requests at a time; for any number of threads.

    Attributes:
      asked: requests that were not answered from the cache.
    """

    def __init__(self, config: EndpointConfig, url: str, key: str) -> None:
        """`url` ends before /chat/completions; `key` may be empty."""
        self._config, self._url = config, f"{url}/chat/completions"
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        folder = config.cache or os.path.join(
            os.environ.get("WALT_CACHE") or "~/.cache/walt_jax", "captions"
        )
        self._cache = Path(folder).expanduser()
        self._free = threading.BoundedSemaphore(config.concurrency)
        self._local, self._count = threading.local(), threading.Lock()
        self.asked = 0

    def __call__(self, clip: Clip) -> Caption:
        """The caption of a clip.

        Raises:
          UserError: the endpoint cannot be reached, refuses the key, or fails after all retries.
            What was answered until then is in the cache.
        """
        count = min(self._config.frames, len(clip.coded))
        where = np.linspace(0, len(clip.coded) - 1, count + 2)[1:-1].round().astype(int)
        request = self._request([clip.coded[i].tobytes() for i in where])
        digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        path = self._cache / digest[:2] / f"{digest}.json"
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Caption(**json.loads(path.read_text()))
        with self._free:
            caption = self._ask(request)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{uuid.uuid4().hex}")
        temporary.write_text(json.dumps(dataclasses.asdict(caption)))
        temporary.replace(path)
        return caption

    def _request(self, images: list[bytes]) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "text", "text": self._config.prompt}]
        for image in images:
            url = f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
            content.append({"type": "image_url", "image_url": {"url": url}})
        return {
            "model": self._config.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._config.max_tokens,
            "temperature": 0,
        }

    def _ask(self, request: Mapping[str, Any]) -> Caption:
        with self._count:
            self.asked += 1
        advice = "what was answered is kept, so run again to go on"
        try:
            answer = self._session.post(
                self._url, json=request, headers=self._headers, timeout=self._config.timeout
            )
        except requests.RequestException as error:
            raise UserError(f"{self._url} does not answer ({error}): {advice}.") from error
        if answer.status_code in _REFUSED:
            return Caption("", f"{answer.status_code}: {answer.text[:200]}")
        if answer.status_code != 200:
            raise UserError(
                f"{self._url} answers {answer.status_code} ({answer.text[:200].strip()}) for the "
                f"model {self._config.model}: check ${URL}, ${KEY} and the model; {advice}."
            )
        try:
            message = answer.json()["choices"][0]["message"]
            text = message["content"]
            if text is None:
                return Caption("", f"refused: {message.get('refusal')}")
            return Caption(" ".join(text.split()))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self._url} gives no chat completion ({answer.text[:200].strip()}): check ${URL}."
            ) from error

    @property
    def _session(self) -> requests.Session:
        """One a thread, which keeps its connection."""
        if not hasattr(self._local, "session"):
            retry = urllib3.Retry(
                total=self._config.retries,
                backoff_factor=0.5,
                backoff_jitter=0.5,
                status_forcelist=_RETRIED,
                allowed_methods=None,
                respect_retry_after_header=True,
                raise_on_status=False,  # the last answer says why
            )
            session = requests.Session()
            adapter = requests.adapters.HTTPAdapter(max_retries=retry)
            session.mount("http://", adapter)
            session.mount("https://", adapter)
            self._local.session = session
        return self._local.session


@functools.lru_cache(maxsize=1)
def captioner(config: EndpointConfig, url: str, key: str) -> Captioner:
    """This process's captioner: the limit of requests is one for all of its threads."""
    return Captioner(config, url, key)
