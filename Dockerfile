FROM python:3.12-slim AS build

RUN pip install --no-cache-dir uv
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never
WORKDIR /app

# Dependencies first: they change less often than the code.
COPY pyproject.toml uv.lock ./
RUN uv sync --locked --no-dev --extra metrics --no-install-project

COPY README.md LICENSE ./
COPY ledger ledger
COPY projections projections
RUN uv sync --locked --no-dev --extra metrics --no-editable

FROM python:3.12-slim

RUN useradd --system --uid 10001 --create-home govledger
COPY --from=build /app/.venv /app/.venv
ENV PATH="/app/.venv/bin:$PATH" PYTHONUNBUFFERED=1
USER govledger
WORKDIR /home/govledger
ENTRYPOINT ["govledger"]
CMD ["--help"]
