# docker build -t llava-align . && docker run --rm -it -v "$PWD:/data" llava-align llava demo   (docs/use/install.md)
FROM python:3.11-slim
# An index of torch's wheels, for CPUs alone or for another CUDA; without one, pip's own index decides.
ARG TORCH_INDEX=""

RUN apt-get update \
    && apt-get install -y --no-install-recommends fonts-wqy-microhei \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --home-dir /data llava \
    && mkdir /data \
    && chown llava /data

WORKDIR /src
COPY . .
RUN pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
    ".[sweep,tensorboard,gguf,score]"

# Caches lie in HOME, which docker run --user needs; torch asks for the name of the user.
ENV HOME=/data USER=llava
USER llava
WORKDIR /data
VOLUME /data
EXPOSE 8000
CMD ["llava", "--help"]
