"""Packaging of walt_jax. Lower bounds live here; `constraints/` pins one tested set per Python."""

from pathlib import Path

from setuptools import find_packages, setup

_HERE = Path(__file__).parent

INSTALL_REQUIRES = [
    "absl-py>=2.1",
    "array_record>=0.8",
    "av>=18.0",  # wheels carry FFmpeg: no system library is needed
    "clu>=0.0.12",
    "etils[epath]>=1.9",
    "flax>=0.12",
    "fsspec>=2024.2",
    "grain>=0.2.10",
    "importlib_resources>=6.0",  # tensorflow-datasets imports it without declaring it
    "jax>=0.10",
    "matplotlib>=3.8",
    "ml_collections>=1.0",
    "numpy>=1.26",
    "opencv-python-headless>=4.9",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.11.20",
    "pillow>=10.0",
    "requests>=2.31",
    "safetensors>=0.4",
    "tensorboard>=2.16",
    # clu.metric_writers imports TensorFlow; the model code never does.
    "tensorflow-cpu>=2.16; platform_machine == 'x86_64' and sys_platform != 'darwin'",
    "tensorflow>=2.16; platform_machine != 'x86_64' or sys_platform == 'darwin'",
    "tensorflow-datasets>=4.9.8",
    "tqdm>=4.66",
]

EXTRAS_REQUIRE = {
    # Workdirs of pods lie on gs://, where orbax lists checkpoints by it without declaring it.
    "tpu": ["google-cloud-storage>=3.0", "jax[tpu]>=0.10"],
    "cuda": ["jax[cuda12]>=0.10"],
    # Curation at scale: `python -m walt_jax.prepare` on Beam, scene cuts, CLIP scores.
    "data": ["apache-beam>=2.70", "onnxruntime>=1.20", "scenedetect-headless>=0.7"],
    # Brings opencv-python beside the headless one, which needs the system's libGL.
    "ocr": ["rapidocr-onnxruntime>=1.4; python_version < '3.13'"],
    # T5 and CLIP from Hugging Face's folders and hub.
    "text": ["huggingface_hub>=0.30", "sentencepiece>=0.2", "tokenizers>=0.20"],
    "eval": ["scikit-image>=0.24", "scipy>=1.11"],
    # What `python -m colabs.build` makes and runs the notebooks with.
    "colabs": ["ipykernel>=6.29", "nbclient>=0.10", "nbformat>=5.10"],
    "parity": [
        "torch==2.13.0",
        "torchvision==0.28.0",
        "transformers>=4.50",
        # The TPU compiler, for what kernels cost; no TPU is needed.
        "jax[tpu]>=0.10; platform_system == 'Linux' and platform_machine == 'x86_64'",
    ],
    "dev": [
        "pytest>=8.0",
        "pytest-xdist>=3.5",
        "hypothesis>=6.100",
        "ruff>=0.8",
        "scenedetect-headless>=0.7",
        "sentencepiece>=0.2",
        "tokenizers>=0.20",
    ],
}

setup(
    name="walt_jax",
    version="0.1.0",
    description="W.A.L.T video diffusion with a MAGVIT-v2 tokenizer in JAX/Flax, for TPU pods",
    long_description=(_HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["walt_jax", "walt_jax.*"]),
    package_data={"walt_jax": ["assets/*/*"]},
    python_requires=">=3.11",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
)
