"""Storage verbs for everything durable: exclusive create, replace, list; on POSIX and object stores."""
