//! A picture of what runs now, drawn over and over, below the list of what is done.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use ovenbird_engine::event::VertexIndex;
use ovenbird_engine::{Event, EventSink};

use super::text::{Lines, fit, width, without_name};
use super::{Clock, Escapes, broken, bytes, clean, seconds};

const FRAME: Duration = Duration::from_millis(100);
/// Log lines below a running step.
const LOG_LINES: usize = 4;
const SPINNER: [char; 10] = ['⠋', '⠙', '⠹', '⠸', '⠼', '⠴', '⠦', '⠧', '⠇', '⠏'];
const BAR: usize = 20;

/// The terminal display: a state that events change, and a thread that draws it.
pub(super) struct Tty<W> {
    screen: Arc<Mutex<Screen<W>>>,
    stop: Arc<AtomicBool>,
    drawer: Mutex<Option<JoinHandle<()>>>,
}

impl<W: Write + Send + 'static> Tty<W> {
    pub(super) fn start(out: W, clock: Clock, escapes: Escapes) -> Self {
        let screen = Arc::new(Mutex::new(Screen::new(out, clock, escapes)));
        let stop = Arc::new(AtomicBool::new(false));
        let drawer = {
            let (screen, stop) = (Arc::clone(&screen), Arc::clone(&stop));
            std::thread::Builder::new().name("progress".into()).spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    screen.lock().unwrap_or_else(PoisonError::into_inner).draw(terminal_size());
                    std::thread::park_timeout(FRAME);
                }
            })
        };
        Self { screen, stop, drawer: Mutex::new(drawer.ok()) }
    }

    pub(super) fn finish(&self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(drawer) = self.drawer.lock().unwrap_or_else(PoisonError::into_inner).take() {
            drawer.thread().unpark();
            let _ = drawer.join();
        }
        self.screen.lock().unwrap_or_else(PoisonError::into_inner).end(terminal_size());
    }
}

impl<W: Write + Send> EventSink for Tty<W> {
    fn emit(&self, event: Event) {
        self.screen.lock().unwrap_or_else(PoisonError::into_inner).take(event);
    }
}

fn terminal_size() -> (usize, usize) {
    match rustix::termios::tcgetwinsize(std::io::stderr()) {
        Ok(size) if size.ws_col > 0 && size.ws_row > 0 => (usize::from(size.ws_col), usize::from(size.ws_row)),
        _ => (80, 24),
    }
}

struct Running {
    name: String,
    started: Duration,
    stdout: Lines,
    stderr: Lines,
    last: VecDeque<String>,
}

struct Transfer {
    label: String,
    current: u64,
    total: Option<u64>,
}

struct Screen<W> {
    out: W,
    clock: Clock,
    colour: bool,
    /// Lines that are written once and stay.
    settled: Vec<String>,
    running: BTreeMap<VertexIndex, Running>,
    transfers: BTreeMap<String, Transfer>,
    /// Transfers that were said to be done: some say so twice.
    finished: HashSet<String>,
    message: Option<String>,
    done: usize,
    cached: usize,
    /// Lines of the picture on the screen.
    drawn: usize,
    frame: usize,
}

impl<W: Write> Screen<W> {
    fn new(out: W, clock: Clock, escapes: Escapes) -> Self {
        Self {
            out,
            clock,
            colour: escapes == Escapes::Colour,
            settled: vec![],
            running: BTreeMap::new(),
            transfers: BTreeMap::new(),
            finished: HashSet::new(),
            message: None,
            done: 0,
            cached: 0,
            drawn: 0,
            frame: 0,
        }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_owned() }
    }

    fn step(&mut self, vertex: VertexIndex, name: Option<String>) -> &mut Running {
        let started = (self.clock)();
        self.running.entry(vertex).or_insert_with(|| Running {
            name: name.unwrap_or_else(|| format!("step {vertex}")),
            started,
            stdout: Lines::default(),
            stderr: Lines::default(),
            last: VecDeque::new(),
        })
    }

    fn take(&mut self, event: Event) {
        let strip = |text: &str| clean(text, Escapes::Strip);
        match event {
            Event::Isolation { level, detail } => {
                let line = format!("isolation: {level} ({detail})");
                self.settled.push(self.paint("2", &line));
            }
            Event::Started { vertex, name, .. } => drop(self.step(vertex, Some(strip(&name)))),
            Event::Explained { vertex, causes } => {
                let name = self.step(vertex, None).name.clone();
                for cause in causes {
                    let line = format!("{name} {}", self.paint("2", &format!("because {}", strip(&cause))));
                    self.settled.push(line);
                }
            }
            Event::Cached { name, .. } => {
                self.cached += 1;
                let line = format!("{} {} {}", self.paint("36", "✓"), strip(&name), self.paint("2", "CACHED"));
                self.settled.push(line);
            }
            Event::Log { vertex, stream, text } => {
                let step = self.step(vertex, None);
                let lines = match stream {
                    ovenbird_engine::event::LogStream::Stdout => step.stdout.push(&text),
                    ovenbird_engine::event::LogStream::Stderr => step.stderr.push(&text),
                };
                for line in lines {
                    step.last.push_back(line);
                    if step.last.len() > LOG_LINES {
                        step.last.pop_front();
                    }
                }
            }
            Event::Finished { vertex, took } => {
                let name = self.step(vertex, None).name.clone();
                self.running.remove(&vertex);
                self.done += 1;
                let line = format!("{} {name} {}", self.paint("32", "✓"), self.paint("2", &seconds(took)));
                self.settled.push(line);
            }
            Event::Failed { vertex, error } => {
                let name = self.step(vertex, None).name.clone();
                self.running.remove(&vertex);
                let line = format!(
                    "{} {name} {}",
                    self.paint("31", "✗"),
                    self.paint("31", &format!("ERROR: {}", without_name(&strip(&error), &name)))
                );
                self.settled.push(line);
            }
            Event::Progress { id, label, current, total, done } => {
                if done {
                    if self.transfers.remove(&id).is_none() && self.finished.contains(&id) {
                        return;
                    }
                    self.finished.insert(id);
                    let line = format!("{} {} {}", self.paint("32", "✓"), strip(&label), self.paint("2", &bytes(current)));
                    self.settled.push(line);
                } else {
                    self.transfers.insert(id, Transfer { label: strip(&label), current, total });
                }
            }
            Event::Warning { code, message, line } => {
                let place = line.map(|l| format!(" (line {l})")).unwrap_or_default();
                let line = format!("{} {code}: {}{place}", self.paint("33", "warning:"), strip(&message));
                self.settled.push(line);
            }
            Event::Breaks(breaks) => self.settled.push(format!("{} {}", self.paint("33", "↻"), broken(breaks))),
            Event::Message { text } => self.message = Some(strip(&text)),
            _ => {}
        }
    }

    /// The picture: summary, running steps with their last lines, transfers. At most `height` lines.
    fn picture(&mut self, columns: usize, height: usize) -> Vec<String> {
        let now = (self.clock)();
        self.frame += 1;
        let spinner = SPINNER[self.frame % SPINNER.len()].to_string();
        let mut lines = vec![];
        let counts = format!("{} done, {} cached", self.done, self.cached);
        let phase = self.message.as_ref().map(|m| format!(" · {m}")).unwrap_or_default();
        lines.push(self.paint("1", &format!("building {} ({counts}){phase}", seconds(now))));
        for step in self.running.values() {
            let time = seconds(now.saturating_sub(step.started));
            let name = fit(&step.name, columns.saturating_sub(time.len() + 3));
            let pad = columns.saturating_sub(width(&name) + time.len() + 2);
            lines.push(format!("{} {name}{}{}", self.paint("36", &spinner), " ".repeat(pad), self.paint("2", &time)));
            let open = [step.stdout.current(), step.stderr.current()];
            let logs: Vec<&str> = step.last.iter().map(String::as_str).chain(open.into_iter().filter(|l| !l.is_empty())).collect();
            for line in &logs[logs.len().saturating_sub(LOG_LINES)..] {
                let line = clean(line, Escapes::Strip);
                lines.push(self.paint("2", &fit(&format!("  │ {line}"), columns)));
            }
        }
        for transfer in self.transfers.values() {
            let amount = match transfer.total {
                Some(total) if total > 0 => {
                    let filled = ((u128::from(transfer.current.min(total)) * BAR as u128) / u128::from(total)) as usize;
                    format!("{}{} {} / {}", "█".repeat(filled), "░".repeat(BAR - filled), bytes(transfer.current), bytes(total))
                }
                _ => bytes(transfer.current),
            };
            let label = fit(&transfer.label, columns.saturating_sub(width(&amount) + 4).max(10));
            lines.push(format!("{} {label}  {amount}", self.paint("36", "↕")));
        }
        // The picture must not scroll: then it could not be drawn over.
        let room = height.saturating_sub(1).max(1);
        if lines.len() > room {
            let hidden = lines.len() - room + 1;
            lines.truncate(room - 1);
            lines.push(format!("… {hidden} more lines"));
        }
        lines.into_iter().map(|line| fit(&line, columns)).collect()
    }

    fn frame(&mut self, lines: &[String], columns: usize) {
        let mut text = String::new();
        if self.drawn > 0 {
            text.push_str("\r\u{1b}[");
            text.push_str(&self.drawn.to_string());
            text.push('A');
        }
        for line in self.settled.drain(..) {
            // What stays may be as long as it is: terminals wrap it, and copying it gives the whole.
            text.push_str(&line);
            text.push_str("\u{1b}[K\n");
        }
        for line in lines {
            text.push_str(&fit(line, columns));
            text.push_str("\u{1b}[K\n");
        }
        text.push_str("\u{1b}[J");
        self.drawn = lines.len();
        let _ = self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush());
    }

    fn draw(&mut self, (columns, height): (usize, usize)) {
        let lines = self.picture(columns, height);
        self.frame(&lines, columns);
    }

    /// The last frame: what stays, and one line that sums up.
    fn end(&mut self, (columns, _): (usize, usize)) {
        let line = format!("finished in {}: {} done, {} cached", seconds((self.clock)()), self.done, self.cached);
        let line = self.paint("1", &line);
        self.settled.push(line);
        self.frame(&[], columns);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Captured, recorded, ticking};
    use super::*;

    fn screen(out: &Captured) -> Screen<Captured> {
        Screen::new(out.clone(), ticking(), Escapes::Strip)
    }

    #[test]
    fn pictures_of_a_recorded_build() {
        let out = Captured::default();
        let mut screen = screen(&out);
        let mut pictures = vec![];
        for (at, event) in recorded().into_iter().enumerate() {
            screen.take(event);
            if at == 11 || at == 15 {
                let settled = std::mem::take(&mut screen.settled).join("\n");
                pictures.push(format!("{settled}\n--\n{}\n==", screen.picture(60, 24).join("\n")));
            }
        }
        insta::assert_snapshot!(pictures.join("\n"));
    }

    #[test]
    fn a_frame_is_drawn_over_the_one_before() {
        let out = Captured::default();
        let mut screen = screen(&out);
        screen.draw((40, 10));
        screen.take(Event::Started { vertex: 1, name: "RUN a".into(), line: None });
        screen.draw((40, 10));
        screen.end((40, 10));
        let text = out.text();
        assert_eq!(text.matches("\r\u{1b}[1A").count(), 1, "{text:?}");
        assert_eq!(text.matches("\r\u{1b}[2A").count(), 1, "{text:?}");
        assert!(text.ends_with("0 done, 0 cached\u{1b}[K\n\u{1b}[J") && !text.contains("?25l"), "{text:?}");
    }

    #[test]
    fn the_picture_fits_the_terminal() {
        let out = Captured::default();
        let mut screen = screen(&out);
        for vertex in 0..30 {
            screen.take(Event::Started { vertex, name: "RUN 日本 ".repeat(30), line: None });
        }
        for (columns, height) in [(80, 24), (20, 5), (1, 1)] {
            let lines = screen.picture(columns, height);
            assert!(lines.len() < height.max(2), "{columns}x{height}: {}", lines.len());
            assert!(lines.iter().all(|l| width(l) <= columns), "{columns}x{height}: {lines:?}");
        }
    }
}
