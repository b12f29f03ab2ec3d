//! One line after the other: for logs and pipes. Lines are written whole, so that steps that run at once never mix within a line.

use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use ovenbird_engine::event::{LogStream, VertexIndex};
use ovenbird_engine::{Event, EventSink};

use super::text::{Lines, without_name};
use super::{Clock, Escapes, broken, bytes, clean, seconds};

/// A long transfer is mentioned this often.
const TRANSFER_INTERVAL: Duration = Duration::from_secs(10);

/// The plain display.
pub(super) struct Plain<W> {
    state: Mutex<State<W>>,
}

struct State<W> {
    out: W,
    clock: Clock,
    escapes: Escapes,
    /// Numbers are given in the order in which things first appear.
    last_number: usize,
    steps: HashMap<VertexIndex, Step>,
    transfers: HashMap<String, Transfer>,
    /// Transfers that were said to be done: some say so twice.
    finished: HashSet<String>,
}

struct Step {
    number: usize,
    name: String,
    started: Duration,
    stdout: Lines,
    stderr: Lines,
}

struct Transfer {
    number: usize,
    started: Duration,
    mentioned: Duration,
}

impl<W: Write + Send> Plain<W> {
    pub(super) fn new(out: W, clock: Clock, escapes: Escapes) -> Self {
        let state =
            State { out, clock, escapes, last_number: 0, steps: HashMap::new(), transfers: HashMap::new(), finished: HashSet::new() };
        Self { state: Mutex::new(state) }
    }

    /// Writes what is left of unfinished lines.
    pub(super) fn finish(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut open: Vec<_> = state.steps.keys().copied().collect();
        open.sort_unstable();
        for vertex in open {
            state.close(vertex);
        }
        let _ = state.out.flush();
    }
}

impl<W: Write + Send> EventSink for Plain<W> {
    fn emit(&self, event: Event) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).show(event);
    }
}

impl<W: Write> State<W> {
    fn write(&mut self, line: &str) {
        // One call a line; a closed standard error must not stop a build.
        let _ = self.out.write_all(format!("{line}\n").as_bytes());
    }

    fn number(&mut self) -> usize {
        self.last_number += 1;
        self.last_number
    }

    fn step(&mut self, vertex: VertexIndex) -> usize {
        if let Some(step) = self.steps.get(&vertex) {
            return step.number;
        }
        let (number, started) = (self.number(), (self.clock)());
        self.steps.insert(vertex, Step { number, name: String::new(), started, stdout: Lines::default(), stderr: Lines::default() });
        number
    }

    fn lines(&mut self, vertex: VertexIndex, lines: Vec<String>) {
        let Some(step) = self.steps.get(&vertex) else { return };
        let (number, elapsed) = (step.number, (self.clock)().saturating_sub(step.started));
        for line in lines {
            let line = clean(&line, self.escapes);
            self.write(format!("#{number} {:.3} {line}", elapsed.as_secs_f64()).trim_end());
        }
    }

    /// Writes what is left of a step's last lines and forgets the step.
    fn close(&mut self, vertex: VertexIndex) -> usize {
        let number = self.step(vertex);
        let rest = self.steps.get_mut(&vertex).map(|s| s.stdout.take().into_iter().chain(s.stderr.take()).collect());
        self.lines(vertex, rest.unwrap_or_default());
        self.steps.remove(&vertex);
        number
    }

    fn show(&mut self, event: Event) {
        let strip = |text: &str| clean(text, Escapes::Strip);
        match event {
            Event::Isolation { level, detail } => self.write(&format!("isolation: {level} ({detail})")),
            Event::Started { vertex, name, .. } => {
                let number = self.step(vertex);
                self.write(&format!("#{number} {}", strip(&name)));
                if let Some(step) = self.steps.get_mut(&vertex) {
                    step.name = name;
                }
            }
            Event::Explained { vertex, causes } => {
                let number = self.step(vertex);
                for cause in causes {
                    self.write(&format!("#{number} because {}", strip(&cause)));
                }
            }
            Event::Cached { name, .. } => {
                let number = self.number();
                self.write(&format!("#{number} {}\n#{number} CACHED", strip(&name)));
            }
            Event::Log { vertex, stream, text } => {
                self.step(vertex);
                let Some(step) = self.steps.get_mut(&vertex) else { return };
                let lines = match stream {
                    LogStream::Stdout => step.stdout.push(&text),
                    LogStream::Stderr => step.stderr.push(&text),
                };
                self.lines(vertex, lines);
            }
            Event::Finished { vertex, took } => {
                let number = self.close(vertex);
                self.write(&format!("#{number} DONE {}", seconds(took)));
            }
            Event::Failed { vertex, error } => {
                let name = self.steps.get(&vertex).map(|s| s.name.clone()).unwrap_or_default();
                let number = self.close(vertex);
                self.write(&format!("#{number} ERROR: {}", strip(without_name(&error, &name))));
            }
            Event::Progress { id, label, current, total, done } => self.transfer(&id, &strip(&label), current, total, done),
            Event::Warning { code, message, line } => {
                let place = line.map(|l| format!(" (line {l})")).unwrap_or_default();
                self.write(&format!("warning: {code}: {}{place}", strip(&message)));
            }
            Event::Breaks(breaks) => {
                let number = self.number();
                self.write(&format!("#{number} {}", broken(breaks)));
            }
            Event::Message { text } => {
                let number = self.number();
                self.write(&format!("#{number} {}", strip(&text)));
            }
            _ => {}
        }
    }

    fn transfer(&mut self, id: &str, label: &str, current: u64, total: Option<u64>, done: bool) {
        let now = (self.clock)();
        if !self.transfers.contains_key(id) {
            if done && self.finished.contains(id) {
                return;
            }
            let number = self.number();
            self.write(&format!("#{number} {label}"));
            self.transfers.insert(id.to_owned(), Transfer { number, started: now, mentioned: now });
        }
        let Some(transfer) = self.transfers.get_mut(id) else { return };
        let number = transfer.number;
        if done {
            let took = now.saturating_sub(transfer.started);
            self.transfers.remove(id);
            self.finished.insert(id.to_owned());
            self.write(&format!("#{number} {} DONE {}", bytes(current), seconds(took)));
        } else if now.saturating_sub(transfer.mentioned) >= TRANSFER_INTERVAL {
            transfer.mentioned = now;
            let of = total.map(|t| format!(" / {}", bytes(t))).unwrap_or_default();
            self.write(&format!("#{number} {}{of}", bytes(current)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Captured, recorded, ticking};
    use super::*;

    fn shown(events: Vec<Event>, clock: Clock, escapes: Escapes) -> String {
        let out = Captured::default();
        let plain = Plain::new(out.clone(), clock, escapes);
        for event in events {
            plain.emit(event);
        }
        plain.finish();
        out.text()
    }

    #[test]
    fn a_recorded_build() {
        insta::assert_snapshot!(shown(recorded(), ticking(), Escapes::Strip));
    }

    #[test]
    fn colours_on_a_terminal_and_open_lines_at_the_end() {
        let log = |text: &str| Event::Log { vertex: 1, stream: LogStream::Stdout, text: text.into() };
        let text = shown(vec![log("\u{1b}[1mbold\u{1b}[2J\n"), log("open")], ticking(), Escapes::Colour);
        assert_eq!(text, "#1 0.100 \u{1b}[1mbold\u{1b}[0m\n#1 0.300 open\n");
    }

    #[test]
    fn long_transfers_are_mentioned_now_and_then() {
        let count = Mutex::new(0);
        let clock: Clock = Box::new(move || {
            let mut count = count.lock().unwrap();
            *count += 4;
            Duration::from_secs(*count)
        });
        let event = |current, done| Event::Progress { id: "x".into(), label: "pulling".into(), current, total: Some(9_000_000), done };
        let events = (0..6).map(|n| event(n * 1_000_000, false)).chain([event(9_000_000, true), event(9_000_000, true)]).collect();
        assert_eq!(shown(events, clock, Escapes::Strip), "#1 pulling\n#1 3.0MB / 9.0MB\n#1 9.0MB DONE 24.0s\n");
    }
}
