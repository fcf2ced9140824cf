"""What the publisher, the consumer and the DLQ processor share; nothing here knows of orders."""
