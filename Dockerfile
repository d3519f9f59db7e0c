# One image for every command: `docker run IMAGE train --model ...` is `dylora train --model ...`, and other programs
# (python, bash, torchrun) run as they are.
# docs/docker.md says how it is built, run and pushed, and what it weighs.

# Python 3.11 is what the versions of constraints.txt were tested on.
FROM python:3.11.15-slim-bookworm

# bubblewrap and libseccomp isolate generated code; tini is process 1: it hands signals on and buries orphans.
# Upstream's version is fixed; Debian's own rebuilds of it, which mend holes, are let in.
RUN apt-get update \
    && apt-get install -y --no-install-recommends 'bubblewrap=0.8.0-*' 'libseccomp2=2.5.4-*' 'tini=0.19.0-*' \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app

# What we depend on, before any code of ours: this layer of gigabytes changes only when one of the two files does.
# The package is installed in place, empty as yet, so its dependencies are those of pyproject.toml and no second list.
COPY pyproject.toml constraints.txt ./
RUN mkdir dylo_moe \
    && touch dylo_moe/__init__.py README.md LICENSE \
    && pip install --no-cache-dir --root-user-action=ignore -c constraints.txt setuptools \
    && pip install --no-cache-dir --root-user-action=ignore -c constraints.txt --no-build-isolation \
        -e '.[eval,quantized,tensorboard,vertex-job,wandb]'

# Any user id may write here, also one that `docker run --user` names and no file knows.
RUN useradd --uid 1000 --create-home dylora \
    && mkdir /home/dylora/.cache runs \
    && chmod 1777 /home/dylora /home/dylora/.cache runs

COPY docker-entrypoint.sh train.py README.md LICENSE ./
COPY recipes recipes
COPY dylo_moe dylo_moe
RUN python -m compileall -q dylo_moe

# HOME and USER: for user ids without an entry in /etc/passwd. The last two: which of a GPU's functions are asked for.
ENV HOME=/home/dylora \
    USER=dylora \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
VOLUME ["/home/dylora/.cache", "/app/runs"]

ENTRYPOINT ["tini", "--", "/app/docker-entrypoint.sh"]
CMD ["--help"]
