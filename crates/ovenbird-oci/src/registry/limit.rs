//! How much one registry is asked at most: transfers at once, requests in a second.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::RegistryOptions;

/// Requests that may go at once after a pause: as many as a second brings.
const BURST: Duration = Duration::from_secs(1);
/// Longest time between two requests, however small the number in the settings.
const MAX_INTERVAL: Duration = Duration::from_mins(1);

/// The limits of every registry that was asked something.
#[derive(Default)]
pub(crate) struct Limits(Mutex<HashMap<String, Arc<Limit>>>);

impl Limits {
    pub(crate) fn of(&self, registry: &str, options: &RegistryOptions) -> Arc<Limit> {
        let mut limits = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(limit) = limits.get(registry) {
            return Arc::clone(limit);
        }
        let limit = Arc::new(Limit::new(options));
        limits.insert(registry.to_owned(), Arc::clone(&limit));
        limit
    }
}

/// The limits of one registry.
pub(crate) struct Limit {
    pub(crate) transfers: Option<Arc<Semaphore>>,
    pace: Option<Pace>,
}

/// A bucket of requests that fills evenly; kept as the time at which it would be full again.
struct Pace {
    interval: Duration,
    full: Mutex<Instant>,
}

impl Limit {
    fn new(options: &RegistryOptions) -> Self {
        let transfers = options.transfers.filter(|n| *n > 0).map(|n| Arc::new(Semaphore::new(n.min(Semaphore::MAX_PERMITS))));
        let interval = options.requests_per_second.filter(|n| *n > 0.0).map(|n| Duration::try_from_secs_f64(1.0 / n));
        let pace = interval
            .map(|interval| Pace { interval: interval.unwrap_or(MAX_INTERVAL).min(MAX_INTERVAL), full: Mutex::new(Instant::now()) });
        Self { transfers, pace }
    }

    /// Waits until one more request may be sent.
    pub(crate) async fn turn(&self) {
        let Some(pace) = &self.pace else { return };
        let wait = {
            let mut full = pace.full.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            let at = (*full).max(now);
            *full = at + pace.interval;
            (at + pace.interval).saturating_duration_since(now + BURST.max(pace.interval))
        };
        if !wait.is_zero() {
            // Many builds that start together must not go on together.
            tokio::time::sleep(wait + pace.interval.mul_f64(0.1 * chance())).await;
        }
    }
}

/// Anything from 0 to 1. Not for secrets.
pub(crate) fn chance() -> f64 {
    random() as f64 / u64::MAX as f64
}

/// Any number. Not for secrets.
pub(crate) fn random() -> u64 {
    // Each state has keys of its own.
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn requests_in_a_second() {
        // A second's worth goes at once, the rest at the pace.
        for (per_second, requests, least, most) in [(Some(100.0), 130, 0.28, 2.0), (None, 1000, 0.0, 0.2), (Some(0.0), 1000, 0.0, 0.2)] {
            let limit = Limit::new(&RegistryOptions { requests_per_second: per_second, ..RegistryOptions::default() });
            let start = Instant::now();
            for _ in 0..requests {
                limit.turn().await;
            }
            let took = start.elapsed().as_secs_f64();
            assert!((least..=most).contains(&took), "{per_second:?}: {took}");
        }
        for (odd, expected) in [
            (f64::NAN, None),
            (-1.0, None),
            (1e-300, Some(MAX_INTERVAL)),
            (f64::INFINITY, Some(Duration::ZERO)),
            (4.0, Some(Duration::from_millis(250))),
        ] {
            let limit = Limit::new(&RegistryOptions { requests_per_second: Some(odd), ..RegistryOptions::default() });
            assert_eq!(limit.pace.map(|pace| pace.interval), expected, "{odd}");
        }
    }
}
