# For `mlflow run . --env-manager local` without an environment of one's own:
#   docker build -t mlflow-icr . && docker run --rm -v "$PWD/outputs:/app/outputs" mlflow-icr
# On a GPU: docker run --gpus all ...; torch from PyPI comes with CUDA.
FROM python:3.11-slim
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE MLproject conda.yaml ./
COPY mlflow_icr mlflow_icr
COPY trainers trainers
RUN pip install --no-cache-dir --constraint constraints.txt --editable '.[mnist5k]'
ENV MLFLOW_TRACKING_URI=sqlite:///outputs/mlflow.db OMP_WAIT_POLICY=passive
ENTRYPOINT ["mlflow", "run", ".", "--env-manager", "local"]
