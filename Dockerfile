# An image of the scripts: docs/deployment.md shows how to run them in it.
FROM python:3.13-slim
WORKDIR /app
COPY . .
RUN pip install --no-cache-dir . && useradd --uid 1000 --no-create-home orders
USER 1000
CMD ["python", "consumer/consumer.py", "orders_stream", "orders.*"]
