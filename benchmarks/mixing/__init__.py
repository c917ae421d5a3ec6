"""The mixing study: rules for domain weights at one budget; see `study`."""
