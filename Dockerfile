# One image for every node and every job.
#
#   docker build --tag REGISTRY/audiomae:cpu .
#   docker build --tag REGISTRY/audiomae:gpu --build-arg FLAVOUR=gpu .
#
# PyPI has one build of torch for Linux, with CUDA, and it runs on CPU machines as well. Where your index also has a
# CPU-only build of the same three versions, `--build-arg TORCH_INDEX=URL` takes it from there and saves about 5 GB on
# nodes without a GPU.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

# KubeRay's probes call wget; `ray up` copies files with rsync over ssh.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates openssh-client procps rsync wget \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0

WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./

# The packages first: they change seldom, the code often.
ARG TORCH_INDEX=
ARG EXTRAS=text
RUN if [ -n "$TORCH_INDEX" ]; then \
        sed --quiet --regexp-extended 's/^(torch|torchvision|torchaudio)==([^+ ]*).*/\1==\2/p' constraints.txt \
            | xargs pip install --index-url "$TORCH_INDEX"; \
    fi \
    && mkdir audiomae ray_jobs serve \
    && touch audiomae/__init__.py ray_jobs/__init__.py serve/__init__.py \
    && pip install --constraint constraints.txt --editable ".[${EXTRAS}]" boto3

# As `make setup-gpu`: faiss-gpu and faiss-cpu have one module name, so never both.
ARG FLAVOUR=cpu
RUN if [ "$FLAVOUR" = gpu ]; then \
        pip uninstall --yes faiss-cpu \
        && pip install --constraint constraints.txt faiss-gpu==1.15.1; \
    elif [ "$FLAVOUR" != cpu ]; then \
        echo "FLAVOUR: expected cpu or gpu, got $FLAVOUR" >&2; exit 1; \
    fi

COPY audiomae audiomae
COPY ray_jobs ray_jobs
COPY serve serve
RUN python -c "import audiomae, ray_jobs, serve, faiss, torch, ray; print(torch.__version__, ray.__version__)" \
    && useradd --create-home --uid 1000 ray && chown -R ray /app
USER ray
CMD ["bash"]
