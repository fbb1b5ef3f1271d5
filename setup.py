"""Installs xmodal; see README.md."""

from setuptools import find_packages, setup

JAX = 'jax>=0.10'

setup(
    name='xmodal',
    version='0.1.0',
    description='One model that looks and reads: joint vision and language training in JAX.',
    python_requires='>=3.11',
    packages=find_packages(include=['xmodal', 'xmodal.*']),
    install_requires=[
        JAX, 'flax>=0.12', 'optax>=0.2.8', 'orbax-checkpoint>=0.11.30', 'absl-py', 'etils', 'ml-collections',
        'numpy', 'pillow', 'opencv-python-headless', 'simplejpeg', 'tokenizers', 'transformers>=5',
        'sentencepiece', 'safetensors', 'tensorflow-cpu', 'tensorboardX', 'tqdm',
    ],
    extras_require={
        'cuda': ['jax[cuda13]'],
        'tpu': ['jax[tpu]'],
        'notebook': ['notebook', 'matplotlib'],
        # An open range of torch takes a release with gigabytes of CUDA packages.
        'test': ['pytest', 'pytest-xdist', 'scikit-learn', 'scipy', 'torch==2.13.0', 'nbclient',
                 'nbformat', 'ipykernel', 'matplotlib'],
    },
)
