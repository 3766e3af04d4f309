"""Fine-tuning: demonstrations, freshly masked at every step."""
