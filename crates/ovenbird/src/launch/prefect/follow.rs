//! One flow run from its creation to its end: its parameters, its states, and what the worker in it says.
//!
//! The worker's words are in log records below DEBUG, numbered, compressed and in order; joined they are byte for byte what it wrote. What
//! Prefect itself has to say (no worker takes the run, the flow crashed) becomes a failure in the same form.

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ovenbird_engine::ops::file::decompress;
use ovenbird_engine::{Event, EventSink};
use serde_json::{Value, json};

use super::server::{Api, ApiError, escaped, text};
use super::{online, warn};
use crate::error::{Error, Kind};
use crate::worker::failure::Failure;
use crate::worker::wire::{Errand, Hello, ToCaller, shown};

/// What records of the worker's words begin with.
const MARK: &str = "ovenbird-wire";

/// Version of their form.
const RECORDS: u32 = 1;

/// Their level.
const LEVEL: u32 = 5;

/// Most plain bytes of a record.
const MAX_PIECE: u64 = 4 << 20;

/// Longest hello.
const MAX_HELLO: usize = 64 << 10;

/// How much of a line says what it is.
const HEAD: usize = 32;

/// Records that are asked for at once: the answer is held as a whole.
const PAGE: usize = 50;

/// Between two looks at the server.
const POLL: Duration = Duration::from_millis(400);

/// Between two looks at the state of the run.
const STATE: Duration = Duration::from_millis(1200);

/// How long a run may be taken by nobody before that is said again.
const LATE: Duration = Duration::from_secs(30);

/// How long the server may not answer before the run is no longer followed.
const LOST: Duration = Duration::from_mins(2);

/// How long the last words may take after the end of the run.
const LAST: Duration = Duration::from_secs(15);

/// Lines of a run that an error shows.
const TAIL: usize = 50;

/// Longest line of them, in bytes.
const WIDTH: usize = 2000;

/// What the caller says.
pub(super) enum Word {
    /// Build this.
    Errand(Box<Errand>),
    /// Stop.
    Cancel,
    /// The caller is done, or gone.
    End,
}

/// Follows one run.
pub(super) struct Follower {
    pub(super) api: Api,
    pub(super) pool: String,
    pub(super) queue: Option<String>,
    pub(super) deployment: String,
    pub(super) job_variables: Value,
    pub(super) sink: Arc<dyn EventSink>,
    /// The caller waits no longer.
    pub(super) stop: Arc<AtomicBool>,
}

/// A run that was made.
struct Run {
    id: String,
    name: String,
}

/// What is known of a state.
struct State {
    kind: String,
    name: String,
    message: String,
}

impl State {
    fn of(run: &Value) -> Self {
        let state = &run["state"];
        Self {
            kind: text(state, "type").to_owned(),
            name: text(state, "name").to_owned(),
            message: shown(text(state, "message").as_bytes(), WIDTH),
        }
    }

    fn is_end(&self) -> bool {
        matches!(self.kind.as_str(), "COMPLETED" | "FAILED" | "CRASHED" | "CANCELLED")
    }
}

/// The worker's words as they come out of records.
#[derive(Default)]
struct Words {
    /// Records that were seen, for the next page.
    seen: usize,
    /// Number of the next record.
    next: u64,
    /// Those that came too early.
    early: BTreeMap<u64, Vec<u8>>,
    /// The last line, as far as it is there.
    line: Vec<u8>,
    /// The worker's own hello came.
    greeted: bool,
    /// The report or the failure came.
    ended: bool,
}

impl Words {
    /// Takes a record; gives what can be passed on.
    fn take(&mut self, message: &str) -> Result<Vec<u8>, String> {
        self.seen += 1;
        let mut parts = message.split(' ');
        let mut part = || parts.next().unwrap_or_default();
        if part() != MARK {
            return Ok(vec![]);
        }
        let version = part();
        if version != RECORDS.to_string() {
            return Err(format!("the flow writes records of version {version:?}, and this program reads version {RECORDS}"));
        }
        let number: u64 = part().parse().map_err(|_| "a record has no number".to_owned())?;
        if number < self.next || self.early.contains_key(&number) {
            return Ok(vec![]);
        }
        let packed = STANDARD.decode(part()).map_err(|error| error.to_string())?;
        let mut plain = vec![];
        let unpacked = decompress(packed.as_slice()).and_then(|reader| reader.take(MAX_PIECE + 1).read_to_end(&mut plain));
        unpacked.map_err(|error| error.to_string())?;
        if plain.len() as u64 > MAX_PIECE {
            return Err("a record is too large".into());
        }
        self.early.insert(number, plain);
        let mut out = vec![];
        while let Some(piece) = self.early.remove(&self.next) {
            self.next += 1;
            out.extend(piece);
        }
        self.look(out)
    }

    /// Takes the hello away, and sees the end. Gives what is to be passed on.
    fn look(&mut self, mut piece: Vec<u8>) -> Result<Vec<u8>, String> {
        if !self.greeted {
            self.line.append(&mut piece);
            let Some(end) = self.line.iter().position(|byte| *byte == b'\n') else {
                return if self.line.len() > MAX_HELLO { Err("the worker does not begin with a hello".into()) } else { Ok(vec![]) };
            };
            match serde_json::from_slice(&self.line[..end]) {
                Ok(ToCaller::Hello(hello)) => {
                    hello.check().map_err(|error| error.to_string())?;
                    piece = self.line.split_off(end + 1);
                    self.line.clear();
                }
                // Without a hello the reason is as good.
                Ok(ToCaller::Failed { .. }) => piece = std::mem::take(&mut self.line),
                _ => return Err("the worker does not begin with a hello".into()),
            }
            self.greeted = true;
        }
        for part in piece.split_inclusive(|byte| *byte == b'\n') {
            // Of a line only the beginning is looked at.
            let room = HEAD.saturating_sub(self.line.len());
            self.line.extend_from_slice(&part[..part.len().min(room)]);
            if part.ends_with(b"\n") {
                self.ended |= self.line.starts_with(b"{\"type\":\"report\"") || self.line.starts_with(b"{\"type\":\"failed\"");
                self.line.clear();
            }
        }
        Ok(piece)
    }
}

/// How a run is no longer followed.
enum Ended {
    /// The worker's last word was passed on, or nobody hears any more.
    Told,
    /// Prefect's own reason.
    Failed(Error),
}

impl From<ApiError> for Ended {
    fn from(error: ApiError) -> Self {
        Self::Failed(error.into())
    }
}

impl Follower {
    /// Waits for the errand, makes the run, and passes on what it says until its end.
    pub(super) fn run(self, words: &Receiver<Word>, mut out: io::PipeWriter) {
        let errand = match words.recv() {
            Ok(Word::Errand(errand)) => errand,
            _ => return,
        };
        let Ended::Failed(error) = self.work(&errand, words, &mut out) else { return };
        let failed = ToCaller::Failed { failure: Box::new(Failure::of(error, ("", ""))) };
        // Who does not hear it has gone.
        let _ = say(&mut out, &failed);
    }

    fn work(&self, errand: &Errand, words: &Receiver<Word>, out: &mut io::PipeWriter) -> Ended {
        let run = match self.create(errand) {
            Ok(run) => run,
            Err(error) => return Ended::Failed(error),
        };
        // From now on it may take as long as it takes: what waits is a run that everybody can see.
        if say(out, &ToCaller::Hello(Hello::own())).is_err() {
            return Ended::Told;
        }
        self.follow(&run, words, out)
    }

    fn create(&self, errand: &Errand) -> Result<Run, Error> {
        let bug = |error: serde_json::Error| Error::from_chain(Kind::Bug, &error);
        let mut parameters = serde_json::to_value(&errand.request).map_err(bug)?;
        parameters["caller"] = serde_json::to_value(&errand.caller).map_err(bug)?;
        let key = format!("ovenbird-{}", random().map_err(|error| Error::from_chain(Kind::Bug, &error))?);
        let mut wanted = json!({
            "parameters": parameters,
            "idempotency_key": key,
            "state": {"type": "SCHEDULED"},
            "tags": ["ovenbird"],
            "job_variables": self.job_variables,
        });
        if let Some(queue) = &self.queue {
            wanted["work_queue_name"] = queue.as_str().into();
        }
        let path = format!("deployments/{}/create_flow_run", self.deployment);
        // The key makes one run of all attempts.
        let made = self.api.post(&path, &wanted);
        let made = made.map_err(|error| Error::from(error).while_doing("cannot start the flow run"))?;
        let run = Run { id: text(&made, "id").to_owned(), name: shown(text(&made, "name").as_bytes(), 80) };
        let page = self.api.address().strip_suffix("/api").map(|server| format!(": {server}/runs/flow-run/{}", run.id)).unwrap_or_default();
        self.tell(format!("flow run {} in the work pool {}{page}", run.name, self.pool));
        Ok(run)
    }

    fn tell(&self, text: String) {
        self.sink.emit(Event::Message { text });
    }

    fn follow(&self, run: &Run, words: &Receiver<Word>, out: &mut io::PipeWriter) -> Ended {
        let mut said = Words::default();
        let (mut asked, mut answered) = (Instant::now() - STATE, Instant::now());
        let (mut begun, mut cancelled, mut noticed, mut over) = (false, false, false, None::<(State, Instant)>);
        let mut waits = Waits { since: Instant::now(), told: None };
        loop {
            match words.recv_timeout(POLL) {
                Err(RecvTimeoutError::Timeout) => {}
                Ok(Word::Errand(_)) => {}
                // Also when the caller breaks off: nobody else knows of this run.
                Ok(Word::Cancel | Word::End) | Err(RecvTimeoutError::Disconnected) if said.ended => return Ended::Told,
                Ok(Word::Cancel | Word::End) if !cancelled => {
                    cancelled = true;
                    self.cancel(run);
                }
                Ok(Word::Cancel | Word::End) => {}
                Err(RecvTimeoutError::Disconnected) => std::thread::sleep(POLL),
            }
            if self.stop.load(Ordering::SeqCst) {
                return Ended::Told;
            }
            let looked = self.pass_on(run, &mut said, out).and_then(|()| {
                if said.ended || over.is_some() || asked.elapsed() < STATE {
                    return Ok(None);
                }
                asked = Instant::now();
                Ok(Some(State::of(&self.api.get(&format!("flow_runs/{}", run.id))?)))
            });
            let state = match looked {
                Ok(state) => state,
                Err(Trouble::Gone) => return Ended::Told,
                Err(Trouble::Wrong(reason)) => {
                    return Ended::Failed(self.failed(run, "says something that is not the protocol of workers", &reason));
                }
                Err(Trouble::Api(ApiError::Missing { .. })) => {
                    return Ended::Failed(Error::new(
                        Kind::Driver,
                        format!("the flow run {} is no longer there: somebody deleted it", run.name),
                    ));
                }
                Err(Trouble::Api(error)) if error.is_transient() && answered.elapsed() < LOST => continue,
                Err(Trouble::Api(error)) => {
                    let hint = format!("the flow run {} ({}) goes on there by itself", run.name, run.id);
                    return Ended::Failed(Error::from(error).while_doing("the build is no longer followed").hint(hint));
                }
            };
            answered = Instant::now();
            if said.ended {
                return Ended::Told;
            }
            if let Some(state) = state {
                match state.kind.as_str() {
                    "SCHEDULED" => waits.look(self, &state),
                    "PENDING" | "RUNNING" if !begun => {
                        begun = true;
                        self.tell(format!("a worker has taken the flow run {}", run.name));
                    }
                    "CANCELLING" if !cancelled && !noticed => {
                        noticed = true;
                        warn(&*self.sink, format!("the flow run {} is being cancelled at the Prefect server", run.name));
                    }
                    _ if state.is_end() => over = Some((state, Instant::now())),
                    _ => {}
                }
            }
            if let Some((state, since)) = &over {
                // Records that were written last are read last; one that was overtaken is found by reading everything again.
                if since.elapsed() > LAST / 2 && !said.early.is_empty() {
                    said.seen = 0;
                }
                let patience = if said.greeted { LAST } else { Duration::from_secs(3) };
                if since.elapsed() > patience || (state.kind == "CANCELLED" && since.elapsed() > 2 * POLL) {
                    return Ended::Failed(self.ended(run, state, cancelled));
                }
            }
        }
    }

    /// Passes on what is new.
    fn pass_on(&self, run: &Run, said: &mut Words, out: &mut io::PipeWriter) -> Result<(), Trouble> {
        loop {
            let wanted = json!({
                "logs": {"flow_run_id": {"any_": [run.id]}, "level": {"le_": LEVEL}},
                "sort": "TIMESTAMP_ASC",
                "offset": said.seen,
                "limit": PAGE,
            });
            let page = self.api.post("logs/filter", &wanted)?;
            let records = page.as_array().map(Vec::as_slice).unwrap_or_default();
            for record in records {
                let piece = said.take(text(record, "message")).map_err(Trouble::Wrong)?;
                out.write_all(&piece).map_err(|_| Trouble::Gone)?;
            }
            if records.len() < PAGE {
                return Ok(());
            }
        }
    }

    fn cancel(&self, run: &Run) {
        let state = json!({"state": {"type": "CANCELLING", "name": "Cancelling", "message": "stopped by the caller"}});
        let done = self.api.post(&format!("flow_runs/{}/set_state", run.id), &state);
        // It is said with a success that it was refused.
        match done {
            Ok(answer) if matches!(text(&answer, "status"), "ACCEPT" | "REJECT") => {
                self.tell(format!("cancelling the flow run {}", run.name))
            }
            Ok(answer) => warn(
                &*self.sink,
                format!("the flow run {} cannot be cancelled: {}", run.name, shown(answer["details"].to_string().as_bytes(), WIDTH)),
            ),
            Err(error) => warn(&*self.sink, format!("the flow run {} cannot be cancelled: {error}", run.name)),
        }
    }

    /// The reason of a run that ended without a report.
    fn ended(&self, run: &Run, state: &State, cancelled: bool) -> Error {
        let message = if state.message.is_empty() { state.name.clone() } else { state.message.clone() };
        match state.kind.as_str() {
            "CANCELLED" if cancelled => Error::new(Kind::Cancelled, "cancelled"),
            "CANCELLED" => self.failed(run, "was cancelled at the Prefect server", &message),
            "CRASHED" => self.failed(run, "crashed", &message),
            "FAILED" => self.failed(run, "failed before the build could say how it went", &message),
            _ => self.failed(run, "ended without a report: its log is not whole", &message),
        }
    }

    /// An error with the last lines that people see in Prefect.
    fn failed(&self, run: &Run, what: &str, reason: &str) -> Error {
        let tail = self.tail(run);
        let mut error = Error::new(Kind::Driver, format!("the flow run {} {what}", run.name)).because(reason);
        let all = format!("{reason}\n{}", tail.join("\n"));
        if all.contains("No module named 'ovenbird_flow'") || all.contains("ovenbird_flow.build") && all.contains("mport") {
            error = error.hint("the worker has no ovenbird_flow: install python/ovenbird_flow of Ovenbird where the worker's Python is");
        } else if all.contains("there is no program `ovenbird`") {
            error = error.hint("install ovenbird where the worker runs, or set OVENBIRD_PROGRAM there");
        } else if all.contains("exit status -9") || all.contains("exit code: -9") || all.contains("OOM") || all.contains("code -9") {
            error = error.hint("it was killed, perhaps because there was not enough memory");
        }
        if tail.is_empty() { error } else { error.because(format!("its last lines were\n{}", tail.join("\n"))) }
    }

    fn tail(&self, run: &Run) -> Vec<String> {
        let wanted = json!({
            "logs": {"flow_run_id": {"any_": [run.id]}, "level": {"ge_": LEVEL + 1}},
            "sort": "TIMESTAMP_DESC",
            "limit": TAIL,
        });
        let page = self.api.post("logs/filter", &wanted).unwrap_or_default();
        let records = page.as_array().into_iter().flatten().rev();
        let mut lines: Vec<String> = records
            .flat_map(|record| text(record, "message").lines().map(|line| shown(line.as_bytes(), WIDTH)).collect::<Vec<_>>())
            .collect();
        lines.split_off(lines.len().saturating_sub(TAIL))
    }
}

/// A run that nobody has taken yet.
struct Waits {
    since: Instant,
    /// When it was last said for what it waits.
    told: Option<Instant>,
}

impl Waits {
    fn look(&mut self, follower: &Follower, state: &State) {
        let first = self.told.is_none();
        if self.told.is_some_and(|told| told.elapsed() < LATE) {
            return;
        }
        let pool = &follower.pool;
        let found = follower.api.get(&format!("work_pools/{}", escaped(pool)));
        let online = online(&follower.api, pool);
        let (Ok(found), Ok(online)) = (found, online) else { return };
        self.told = Some(Instant::now());
        let paused = found["is_paused"].as_bool().unwrap_or_default();
        let late = state.name == "Late";
        let why = if paused {
            format!("the work pool {pool} is paused: the run waits until `prefect work-pool resume {pool}`")
        } else if online == 0 {
            format!("no worker of the work pool {pool} is online: the run waits for one (`prefect worker start --pool {pool}`)")
        } else if late {
            let limit = found["concurrency_limit"].as_u64().map(|limit| format!(", at most {limit} runs at once")).unwrap_or_default();
            let seconds = self.since.elapsed().as_secs();
            format!("the run is late: none of the {online} worker(s) of the work pool {pool} has taken it for {seconds} s{limit}; it waits")
        } else if first {
            follower.tell(format!("waiting for a worker of the work pool {pool}"));
            return;
        } else {
            return;
        };
        warn(&*follower.sink, why);
    }
}

enum Trouble {
    Api(ApiError),
    /// Not what the flow writes.
    Wrong(String),
    /// Nobody reads any more.
    Gone,
}

impl From<ApiError> for Trouble {
    fn from(error: ApiError) -> Self {
        Self::Api(error)
    }
}

fn say(out: &mut io::PipeWriter, message: &ToCaller) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    out.write_all(&line)
}

/// 32 random digits.
fn random() -> io::Result<String> {
    let mut bytes = [0u8; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the flow packs it.
    fn record(number: u64, plain: &[u8]) -> String {
        // Stored, not compressed: gzip's own format, RFC 1952 and 1951.
        let mut packed = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255, 1];
        let length = plain.len() as u16;
        packed.extend(length.to_le_bytes());
        packed.extend((!length).to_le_bytes());
        packed.extend(plain);
        let crc = plain.iter().fold(!0u32, |crc, byte| {
            (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 })
        });
        packed.extend((!crc).to_le_bytes());
        packed.extend(u32::from(length).to_le_bytes());
        format!("{MARK} {RECORDS} {number} {}", STANDARD.encode(packed))
    }

    fn hello() -> Vec<u8> {
        serde_json::to_vec(&ToCaller::Hello(Hello::own())).unwrap()
    }

    #[test]
    fn words_come_out_as_they_went_in() {
        let all = [hello(), b"\n{\"type\":\"event\"}\n{\"type\":\"report\",\"x\":1}\n".to_vec()].concat();
        let expect = "{\"type\":\"event\"}\n{\"type\":\"report\",\"x\":1}\n";
        for cut in 1..all.len() - 1 {
            let (one, two) = all.split_at(cut);
            for order in [[0, 1], [1, 0]] {
                let records = [record(0, one), record(1, two)];
                let mut words = Words::default();
                let mut got = vec![];
                for at in order {
                    got.extend(words.take(&records[at]).unwrap());
                    assert!(words.take(&records[at]).unwrap().is_empty(), "said twice");
                }
                let got = String::from_utf8(got).unwrap();
                assert!(words.ended && words.greeted, "{cut}");
                assert_eq!(got, expect, "{cut} {order:?}");
            }
        }
    }

    #[test]
    fn foreign_records() {
        let mut words = Words::default();
        assert_eq!(words.take("something else").unwrap(), b"");
        for (record, expect) in [
            (format!("{MARK} 9 0 AAAA"), "records of version \"9\""),
            (format!("{MARK} {RECORDS} x AAAA"), "no number"),
            (format!("{MARK} {RECORDS} 0 ?"), "Invalid"),
            (format!("{MARK} {RECORDS} 0"), "does not begin"),
            (record(0, b"{\"type\":\"report\"}\n"), "does not begin with a hello"),
            (record(0, b"{\"type\":\"hello\",\"protocol\":77,\"version\":\"9\",\"capabilities\":[]}\n"), "version 77"),
        ] {
            let got = Words::default().take(&record);
            assert!(got.as_ref().is_err_and(|error| error.contains(expect)) || got.as_ref().is_ok_and(Vec::is_empty), "{record}: {got:?}");
        }
    }
}
