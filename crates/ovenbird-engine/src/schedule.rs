//! Works off a graph on a bounded number of threads.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Vertices that wait for others, those that can start, and how many are not done yet.
#[derive(Debug, Default)]
struct Queue {
    /// Lowest number first, which is the order of the Dockerfile.
    ready: BinaryHeap<Reverse<usize>>,
    /// How many inputs of a vertex are not done.
    missing: BTreeMap<usize, usize>,
    /// Who waits for a vertex.
    dependents: BTreeMap<usize, Vec<usize>>,
    left: usize,
    /// A vertex failed (or its thread died): nothing more starts.
    stopped: bool,
}

/// Runs `work` once for every vertex of `graph` (vertex → those it needs, all of them in `graph`), each after what it needs, on at most
/// `threads` threads, of which the caller's is one. With fewer threads than asked for (a process limit) it is only slower. The graph must
/// have no cycle. After the first error nothing more starts, and the first error is returned.
pub fn run<E: Send>(graph: &BTreeMap<usize, Vec<usize>>, threads: usize, work: impl Fn(usize) -> Result<(), E> + Sync) -> Result<(), E> {
    let mut queue = Queue { left: graph.len(), ..Queue::default() };
    for (vertex, needs) in graph {
        if needs.is_empty() {
            queue.ready.push(Reverse(*vertex));
        }
        queue.missing.insert(*vertex, needs.len());
        for need in needs {
            queue.dependents.entry(*need).or_default().push(*vertex);
        }
    }
    let schedule = Schedule { queue: Mutex::new(queue), changed: Condvar::new() };
    let failure = Mutex::new(None);
    let worker = || {
        while let Some(turn) = schedule.next() {
            match work(turn.vertex) {
                Ok(()) => turn.done(),
                Err(error) => {
                    failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.min(graph.len()) {
            if std::thread::Builder::new().name("ovenbird-step".into()).spawn_scoped(scope, worker).is_err() {
                break;
            }
        }
        worker();
    });
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

struct Schedule {
    queue: Mutex<Queue>,
    changed: Condvar,
}

/// A vertex that one thread works on; dropped without [`Turn::done`], it stops the others.
struct Turn<'s> {
    schedule: &'s Schedule,
    vertex: usize,
    done: bool,
}

impl Schedule {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a vertex that can start; `None`: all are done or will never start.
    fn next(&self) -> Option<Turn<'_>> {
        let mut queue = self.lock();
        loop {
            if queue.stopped || queue.left == 0 {
                return None;
            }
            if let Some(Reverse(vertex)) = queue.ready.pop() {
                return Some(Turn { schedule: self, vertex, done: false });
            }
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Turn<'_> {
    fn done(mut self) {
        self.done = true;
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut queue = self.schedule.lock();
        if self.done {
            queue.left -= 1;
            for dependent in queue.dependents.remove(&self.vertex).unwrap_or_default() {
                if let Some(missing) = queue.missing.get_mut(&dependent) {
                    *missing -= 1;
                    if *missing == 0 {
                        queue.ready.push(Reverse(dependent));
                    }
                }
            }
        } else {
            queue.stopped = true;
        }
        self.schedule.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn graph(edges: &[(usize, &[usize])]) -> BTreeMap<usize, Vec<usize>> {
        edges.iter().map(|(vertex, needs)| (*vertex, needs.to_vec())).collect()
    }

    #[test]
    fn every_vertex_runs_once_after_its_inputs() {
        let graph = graph(&[(0, &[]), (1, &[]), (2, &[0, 1]), (3, &[2]), (4, &[0]), (5, &[3, 4])]);
        for threads in [1, 2, 8] {
            let order = Mutex::new(vec![]);
            run(&graph, threads, |vertex| {
                order.lock().unwrap().push(vertex);
                Ok::<_, ()>(())
            })
            .unwrap();
            let order = order.into_inner().unwrap();
            assert_eq!(order.len(), graph.len(), "{threads} threads");
            let place = |vertex: &usize| order.iter().position(|v| v == vertex).unwrap();
            for (vertex, needs) in &graph {
                assert!(needs.iter().all(|need| place(need) < place(vertex)), "{threads} threads: {order:?}");
            }
        }
    }

    #[test]
    fn one_thread_follows_the_dockerfile() {
        let order = Mutex::new(vec![]);
        run(&graph(&[(0, &[]), (1, &[0]), (2, &[]), (3, &[2, 1])]), 1, |vertex| {
            order.lock().unwrap().push(vertex);
            Ok::<_, ()>(())
        })
        .unwrap();
        assert_eq!(order.into_inner().unwrap(), [0, 1, 2, 3]);
    }

    #[test]
    fn an_error_stops_what_has_not_started() {
        let ran = AtomicUsize::new(0);
        let chain: BTreeMap<usize, Vec<usize>> = (0..100).map(|n: usize| (n, n.checked_sub(1).into_iter().collect())).collect();
        let result = run(&chain, 4, |vertex| {
            ran.fetch_add(1, Ordering::SeqCst);
            if vertex == 10 { Err("no") } else { Ok(()) }
        });
        assert_eq!((result, ran.into_inner()), (Err("no"), 11));
    }

    #[test]
    fn a_panic_ends_the_others_too() {
        let chain: BTreeMap<usize, Vec<usize>> = (0..10).map(|n: usize| (n, n.checked_sub(1).into_iter().collect())).collect();
        let outcome = std::panic::catch_unwind(|| {
            run(&chain, 3, |vertex| {
                assert_ne!(vertex, 5, "on purpose");
                Ok::<_, ()>(())
            })
        });
        assert!(outcome.is_err());
    }

    #[test]
    fn as_many_at_once_as_threads() {
        let barrier = std::sync::Barrier::new(3);
        run(&graph(&[(0, &[]), (1, &[]), (2, &[])]), 3, |_| {
            barrier.wait();
            Ok::<_, ()>(())
        })
        .unwrap();
    }
}
