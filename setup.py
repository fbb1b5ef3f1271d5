"""Installs xmodal; see README.md."""

from setuptools import find_packages, setup

JAX = 'jax>=0.10'
# TensorFlow without a GPU's code, for the machines that it is published for.
SMALL_TENSORFLOW = 'platform_machine in "x86_64 AMD64" and sys_platform != "darwin"'
OTHER_TENSORFLOW = 'platform_machine not in "x86_64 AMD64" or sys_platform == "darwin"'

setup(
    name='xmodal',
    version='0.1.0',
    description='One model that looks and reads: joint vision and language training in JAX.',
    python_requires='>=3.11',
    packages=find_packages(include=['xmodal', 'xmodal.*']),
    install_requires=[
        JAX, 'flax>=0.12', 'optax>=0.2.8', 'orbax-checkpoint>=0.11.30', 'absl-py', 'etils', 'ml-collections',
        'ml-dtypes', 'numpy', 'pillow', 'opencv-python-headless', 'simplejpeg', 'tokenizers',
        'transformers>=5', 'huggingface-hub', 'sentencepiece', 'safetensors', 'pycocotools',
        f'tensorflow-cpu; {SMALL_TENSORFLOW}', f'tensorflow; {OTHER_TENSORFLOW}', 'tensorboardX', 'tqdm',
        'weblate-fonts',  # letters of all scripts in pictures; without it plain Latin
    ],
    extras_require={
        'cuda': ['jax[cuda13]'],
        'tpu': ['jax[tpu]'],
        'notebook': ['notebook', 'matplotlib'],
        'meteor': ['pycocoevalcap'],  # 104 MB, and it wants Java
        # An open range of torch takes a release with gigabytes of CUDA packages.
        'test': ['pytest', 'pytest-xdist', 'scikit-learn', 'scipy', 'torch==2.13.0', 'nbclient',
                 'nbformat', 'ipykernel', 'matplotlib', 'pycocoevalcap'],
    },
)
