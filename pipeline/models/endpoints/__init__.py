"""Call a service with the interface of OpenAI: requests, answers, rate limits, and attempts."""
