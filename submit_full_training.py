"""Train on Google Cloud: set the constants below, then `python submit_full_training.py`. docs/vertex.md says more.

It is `dylora submit` with these constants as its flags. None is the default, or a flag that must be typed. What is
typed wins over a constant: `python submit_full_training.py --num_epochs 1 --dry_run` prints the job and sends nothing.
Any other flag of `dylora submit` can be added as a constant in capital letters, such as LORA_R = 16.
"""

import sys

from dylo_moe.cli import main

# Google Cloud.
PROJECT_ID = None  # id of the project; None: the variable GOOGLE_CLOUD_PROJECT
REGION = None  # such as "europe-west4"; None: "us-central1"
BUCKET_NAME = None  # needed: "my-bucket", or "my-bucket/folder"
DISPLAY_NAME = None  # needed: name of the job and of its run's folder; the same name again resumes the run
SERVICE_ACCOUNT = None  # whom the job acts as, an e-mail address; None: Vertex AI's own agent
SECRETS = None  # variables from Secret Manager, such as ["WANDB_API_KEY=wandb:latest", "HF_TOKEN=hub:latest"]

# The container image that build_and_push.sh pushed: its parts in Artifact Registry, or its whole name.
DOCKER_REPO_NAME = None  # the repository: REGION-docker.pkg.dev/PROJECT_ID/DOCKER_REPO_NAME/IMAGE_NAME:IMAGE_TAG
IMAGE_NAME = None  # None: "dylora-moe"
IMAGE_TAG = None  # None: the version of this package
IMAGE = None  # instead of the three above, such as "docker.io/somebody/dylora-moe:0.1.0"

# The machine.
MACHINE_TYPE = None  # None: "g2-standard-12", which comes with one NVIDIA_L4
ACCELERATOR_TYPE = None  # such as "NVIDIA_TESLA_T4"; None: what comes with the machine
ACCELERATOR_COUNT = None  # each accelerator gets a process; None: as many as come with the machine
USE_SPOT = None  # True: cheaper, but may be taken away at any time; set SAVE_STEPS too

# The training.
WANDB_CHECKPOINT_ARTIFACT = None  # begin from this checkpoint: "user/project/artifact:version"
RECIPE = None  # a YAML file, or the name of a recipe such as "code"; the constants below win over it
MODEL = None  # the base: a hub id, or a folder under /gcs/
DATASETS = None  # such as ["code_alpaca", "mbpp"]
NUM_EXPERTS = None
NUM_EPOCHS = None
SAVE_STRATEGY = None  # "steps", "epoch" or "no"
SAVE_STEPS = None  # with SAVE_STRATEGY = "steps"
REPORT_TO = None  # "wandb"; it needs WANDB_API_KEY in SECRETS

if __name__ == "__main__":
    sys.exit(main(["submit", *sys.argv[1:]], constants=globals()))
