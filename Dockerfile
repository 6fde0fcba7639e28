# Mnemos on NVIDIA's PyTorch image: its torch and CUDA toolkit stay, launch.sh installs the rest beside them.
#
#   docker build -t mnemos .
#   docker run --rm --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 \
#       -v "$PWD/outputs":/workspace/mnemos/outputs mnemos --num_gpus 4 miras_64k
#
# docs/miras_64k.md says more. The tag decides torch (2.10 or newer is needed) and CUDA.
FROM nvcr.io/nvidia/pytorch:25.11-py3

# venv for set-up; ssh and pdsh for DeepSpeed's launcher on several nodes.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /workspace/mnemos

# An image without the native kernels would be slow in silence: `require` fails here and says why, `auto` only warns.
ARG MNEMOS_BUILD=require
ENV MNEMOS_BUILD=${MNEMOS_BUILD}

# What set-up depends on comes first, so that another change does not repeat it.
COPY launch.sh setup.py pyproject.toml constraints.txt README.md LICENSE ./
COPY kernels/ kernels/
COPY pipeline/__init__.py pipeline/
RUN ./launch.sh --setup-only
COPY . .

ENTRYPOINT ["./launch.sh"]
