# docker build -t penstock .                          PyTorch's CPU build
# docker build -t penstock --build-arg TORCH=cuda .   the default build, with CUDA; run it with --gpus all
# docker run --rm -u "$(id -u)" -v "$PWD:/work" penstock sft --model ... --out runs/sft
FROM python:3.13-slim-trixie
ARG TORCH=cpu
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/penstock
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY tools tools
COPY src src
RUN PYTHON=python3 TORCH=$TORCH EXTRAS=serve,verify,hub,gguf sh tools/setup.sh /opt/venv && penstock doctor
# Behind doctor, whose cache is root's: what whoever runs the image compiles for its machine.
ENV XDG_CACHE_HOME=/tmp
WORKDIR /work
ENTRYPOINT ["penstock"]
CMD ["--help"]
