# The authority alone: no embedded Postgres, no tests, no compiler.
FROM python:3.13-slim AS build
WORKDIR /build
RUN python -m venv /opt/privyseal
COPY requirements.lock requirements-dev.lock ./
RUN /opt/privyseal/bin/pip install --no-cache-dir --require-hashes -r requirements.lock
# The build backend and what it needs, with the hashes of the lock, and outside of what is shipped.
# If it comes to need more, pip refuses and names it.
ARG BACKEND="editables|hatchling|packaging|pathspec|pluggy|tomlkit|trove-classifiers"
RUN awk "/^[a-z]/ { kept = /^($BACKEND)==/ } kept" requirements-dev.lock > build.lock \
 && pip install --no-cache-dir --require-hashes -r build.lock
COPY pyproject.toml README.md LICENSE ./
COPY keys keys
COPY service service
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir dist . \
 && /opt/privyseal/bin/pip install --no-cache-dir --no-deps dist/*.whl

FROM python:3.13-slim
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin privyseal \
 && install -d -o privyseal -g privyseal -m 0700 /var/lib/privyseal /var/lib/privyseal-checkpoints
COPY --from=build /opt/privyseal /opt/privyseal
ENV PATH=/opt/privyseal/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PRIVYSEAL_DATA_DIR=/var/lib/privyseal
USER 10001
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/healthz', timeout=2)"]
ENTRYPOINT ["privyseal"]
CMD ["serve", "--host", "0.0.0.0"]
