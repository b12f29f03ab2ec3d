//! Shows events on standard error while a command runs.
//!
//! What steps print is foreign: control sequences never reach a terminal, except colours. No terminal state is ever changed (no raw
//! mode, no hidden cursor), so there is nothing to restore however the process ends.

mod plain;
mod text;
mod tty;

use std::io::{IsTerminal as _, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ovenbird::settings::Progress as Mode;
use ovenbird_engine::event::Silent;
use ovenbird_engine::{Event, EventSink};
use ovenbird_oci::registry::Breaks;

pub(crate) use text::{Escapes, clean};

/// Time since the start; a function, so that tests can say what it is.
type Clock = Box<dyn Fn() -> Duration + Send>;

fn clock() -> Clock {
    let start = Instant::now();
    Box::new(move || start.elapsed())
}

/// A running display.
pub(crate) struct Progress {
    sink: Arc<dyn EventSink>,
    finish: Box<dyn FnOnce()>,
}

impl Progress {
    /// Where events go.
    pub(crate) fn sink(&self) -> &Arc<dyn EventSink> {
        &self.sink
    }

    /// Shows what is still to be shown. Nothing is written afterwards.
    pub(crate) fn finish(self) {
        (self.finish)();
    }
}

/// Drops what is shown only when it is asked for.
struct Unexplained(Arc<dyn EventSink>);

impl EventSink for Unexplained {
    fn emit(&self, event: Event) {
        if !matches!(event, Event::Explained { .. }) {
            self.0.emit(event);
        }
    }
}

/// Starts a display. `Auto` must have been decided. With `explain` it says why a step runs; raw events always do.
pub(crate) fn start(mode: Mode, no_colour: bool, explain: bool) -> Progress {
    let mut progress = start_all(mode, no_colour);
    if !explain && mode != Mode::RawJson {
        progress.sink = Arc::new(Unexplained(progress.sink));
    }
    progress
}

fn start_all(mode: Mode, no_colour: bool) -> Progress {
    let terminal = std::io::stderr().is_terminal();
    let escapes = if terminal && !no_colour { Escapes::Colour } else { Escapes::Strip };
    match mode {
        Mode::Quiet => Progress { sink: Arc::new(Silent), finish: Box::new(|| {}) },
        Mode::RawJson => Progress { sink: Arc::new(RawJson { out: Mutex::new(std::io::stderr()) }), finish: Box::new(|| {}) },
        Mode::Tty => {
            let tty = Arc::new(tty::Tty::start(std::io::stderr(), clock(), escapes));
            Progress { sink: Arc::clone(&tty) as Arc<dyn EventSink>, finish: Box::new(move || tty.finish()) }
        }
        Mode::Auto | Mode::Plain => {
            let plain = Arc::new(plain::Plain::new(std::io::stderr(), clock(), escapes));
            Progress { sink: Arc::clone(&plain) as Arc<dyn EventSink>, finish: Box::new(move || plain.finish()) }
        }
    }
}

/// One event a line, as JSON.
struct RawJson<W> {
    out: Mutex<W>,
}

impl<W: Write + Send> EventSink for RawJson<W> {
    fn emit(&self, event: Event) {
        if let Ok(mut line) = serde_json::to_vec(&event) {
            line.push(b'\n');
            // A closed standard error must not stop a build.
            let _ = self.out.lock().unwrap_or_else(PoisonError::into_inner).write_all(&line);
        }
    }
}

/// Bytes for people, in powers of 1000 as Docker shows them.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{count}B") } else { format!("{value:.1}{}", UNITS[unit]) }
}

/// What broken connections cost, for people.
pub(crate) fn broken(breaks: Breaks) -> String {
    let Breaks { count, resumed, retried } = breaks;
    let times = if count == 1 { "once".to_owned() } else { format!("{count} times") };
    format!("transfers broke {times}: {} were not sent again, {} were", bytes(resumed), bytes(retried))
}

/// A duration for people.
pub(crate) fn seconds(duration: Duration) -> String {
    let whole = duration.as_secs();
    if whole >= 60 { format!("{}m{:02}s", whole / 60, whole % 60) } else { format!("{:.1}s", duration.as_secs_f64()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ovenbird_engine::event::LogStream;

    /// Standard error of the tests.
    #[derive(Clone, Default)]
    pub(super) struct Captured(pub(super) Arc<Mutex<Vec<u8>>>);

    impl Captured {
        pub(super) fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    impl Write for Captured {
        fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(buf);
            Ok(buf.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// A clock that goes on by a tenth of a second at each look.
    pub(super) fn ticking() -> Clock {
        let count = Mutex::new(0);
        Box::new(move || {
            let mut count = count.lock().unwrap();
            *count += 100;
            Duration::from_millis(*count)
        })
    }

    /// A build as it was recorded: two steps at once, a cached one, a pull, a warning, colours and carriage returns.
    pub(super) fn recorded() -> Vec<Event> {
        let log = |vertex, text: &str| Event::Log { vertex, stream: LogStream::Stdout, text: text.into() };
        vec![
            Event::Isolation { level: "rootless".into(), detail: "user namespace with subordinate ids".into() },
            Event::Warning { code: "StageNameCasing".into(), message: "stage name `Build` should be lower case".into(), line: Some(2) },
            Event::Progress {
                id: "pull sha256:aa".into(),
                label: "pulling debian:12 layer aa".into(),
                current: 0,
                total: Some(50_000_000),
                done: false,
            },
            Event::Cached { vertex: 0, name: "[build 1/3] FROM debian:12".into() },
            Event::Started { vertex: 7, name: "[build 2/3] RUN make".into(), line: Some(3) },
            Event::Started { vertex: 4, name: "[docs 1/1] RUN mkdocs".into(), line: Some(9) },
            log(7, "cc -c a.c\ncc -c "),
            log(4, "\u{1b}[32mINFO\u{1b}[0m reading\n"),
            log(7, "b.c\n"),
            log(7, "10%\r50%\r100%\r\n"),
            log(7, "\u{1b}]0;evil title\u{7}\u{1b}[2Jplain\n"),
            Event::Log { vertex: 7, stream: LogStream::Stderr, text: "no newline at the end".into() },
            Event::Progress {
                id: "pull sha256:aa".into(),
                label: "pulling debian:12 layer aa".into(),
                current: 50_000_000,
                total: Some(50_000_000),
                done: true,
            },
            Event::Finished { vertex: 4, took: Duration::from_millis(1234) },
            Event::Failed { vertex: 7, error: "[build 2/3] RUN make: process \"make\" did not complete successfully: exit code: 2".into() },
            Event::Breaks(Breaks { count: 2, resumed: 41_000_000, retried: 120_000 }),
            Event::Message { text: "exporting".into() },
        ]
    }

    #[test]
    fn raw_json_is_one_event_a_line() {
        let out = Captured::default();
        let sink = RawJson { out: Mutex::new(out.clone()) };
        for event in recorded() {
            sink.emit(event);
        }
        let back: Vec<Event> = out.text().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(back, recorded());
    }

    #[test]
    fn numbers_for_people() {
        for (count, expect) in
            [(0, "0B"), (999, "999B"), (1000, "1.0kB"), (999_950, "1.0MB"), (12_345_678, "12.3MB"), (5_000_000_000, "5.0GB")]
        {
            assert_eq!(bytes(count), expect);
        }
        for (millis, expect) in [(0, "0.0s"), (1234, "1.2s"), (59_900, "59.9s"), (61_000, "1m01s")] {
            assert_eq!(seconds(Duration::from_millis(millis)), expect);
        }
    }
}
