"""Installs xmodal; see README.md."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
JAX = 'jax>=0.10'
_X86_LINUX = "sys_platform == 'linux' and platform_machine == 'x86_64'"
SERVE = ['fastapi', 'uvicorn', 'python-multipart>=0.0.13', 'prometheus-client']
# Without a bound pip takes s3fs of 2020 where botocore is newer than the new one accepts.
GCS, S3 = ['gcsfs>=2024.2'], ['s3fs>=2024.2']
TFDS = ['tensorflow-datasets', 'array_record', 'importlib_resources',
        f'tensorflow-cpu; {_X86_LINUX}',  # a tenth of the size, and leaves the GPU's memory to JAX
        "tensorflow; sys_platform != 'linux' or platform_machine != 'x86_64'"]

setup(
    name='xmodal',
    # Read, not imported: another xmodal may be installed.
    version=re.search("__version__ = '(.+)'", (HERE / 'xmodal' / '__init__.py').read_text())[1],
    description='One model that looks and reads: joint vision and language training in JAX.',
    long_description=(HERE / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author='The xmodal authors',
    license_expression='Apache-2.0',
    license_files=['LICENSE'],
    keywords=['jax', 'flax', 'vision-language', 'multimodal', 'multitask',
              'visual question answering', 'image captioning', 'image-text retrieval',
              'object detection', 'image generation'],
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'Operating System :: MacOS',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Recognition',
    ],
    python_requires='>=3.11',
    # Configs lie beside the package, where people look, and are installed inside it.
    packages=[*find_packages(include=['xmodal', 'xmodal.*']), 'xmodal.configs'],
    package_dir={'xmodal.configs': 'configs'},
    package_data={'xmodal.cost': ['*.txtpb'], 'xmodal.serve': ['page/*']},
    entry_points={'console_scripts': ['xmodal = xmodal.cli:main']},
    install_requires=[
        JAX, 'flatbuffers',  # for jax.export
        'flax>=0.12', 'optax>=0.2.8', 'orbax-checkpoint>=0.11.30', 'absl-py', 'etils',
        'google-crc32c', 'fsspec>=2024.2', 'jaxtyping', 'ml-collections', 'ml-dtypes', 'msgpack',
        'numpy', 'pillow', 'opencv-python-headless', 'simplejpeg', 'tokenizers',
        'transformers>=5', 'huggingface-hub', 'sentencepiece', 'safetensors', 'pycocotools',
        'pyyaml', 'tensorboard', 'tqdm',
        'weblate-fonts',  # letters of all scripts in pictures; without it plain Latin
    ],
    extras_require={
        'cuda': ['jax[cuda13]'],
        'tpu': ['jax[tpu]'],
        'serve': SERVE,
        'notebook': ['notebook', 'matplotlib'],
        'parquet': ['pyarrow'],
        'tfds': TFDS,
        'hf': ['datasets'],
        'gcs': GCS,
        's3': S3,
        'onnx': ['jax2onnx', 'onnxruntime'],  # of xmodal export --format
        'saved_model': ['tensorflow'],
        'wandb': ['wandb'],
        'trackio': ['trackio'],
        'meteor': ['pycocoevalcap'],  # 104 MB, and it wants Java
        # An open range of torch takes a release with gigabytes of CUDA packages.
        'test': ['pytest', 'pytest-xdist', 'beartype', 'scikit-learn', 'scipy', 'torch==2.13.0',
                 'nbclient', 'nbformat', 'ipykernel', 'matplotlib', 'pycocoevalcap', 'pyarrow',
                 'webdataset', 'ruff==0.17.*',  # the next may find more
                 *SERVE, 'httpx', 'websockets', 'jsonschema', 'openapi-spec-validator',
                 *TFDS, 'datasets', *GCS, *S3,
                 'gcp-storage-emulator', 'moto[server]'],
    },
)
