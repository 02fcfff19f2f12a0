"""The actors that know the workers: who is there (workforce), what each is asked (worker_handle), who gets which (scheduler)."""
