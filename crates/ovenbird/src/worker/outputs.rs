//! Outputs that go to the caller's machine, at the worker's end. An archive goes through a pipe while it is made; a folder is made aside
//! and sent when it is whole.

use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use ovenbird_dockerfile::ignore::Patterns;
use ovenbird_oci::beside;

use super::folder::{self, SendError};
use super::wire::{Sender, ToCaller};
use crate::error::{Error, Kind};
use crate::pieces::{PIECE, Pieces};
use crate::report::BuildReport;
use crate::request::{BuildRequest, Dest, Output, OutputKind};

/// Takes the place out of an output.
pub(super) fn forget_place(output: &mut Output) {
    match &mut output.kind {
        OutputKind::OciTar(dest) | OutputKind::DockerTar(dest) | OutputKind::Tar(dest) => *dest = Dest::Stdout,
        OutputKind::OciDir(dir) | OutputKind::Local(dir) => *dir = PathBuf::new(),
        OutputKind::Image | OutputKind::Registry | OutputKind::Load | OutputKind::CacheOnly => {}
    }
}

enum Sending {
    /// The engine writes into the pipe; a thread sends what comes out.
    Archive {
        pipe: io::PipeWriter,
        sends: JoinHandle<io::Result<()>>,
    },
    Folder(beside::Folder),
    /// It is where it should be.
    Nothing,
}

/// What goes to the caller, by place in the request.
pub(super) struct Outputs(Vec<(usize, Sending)>);

impl Outputs {
    /// Gives each such output a place here. `engine`: the Docker Engine that builds is the caller's own, and has the image already.
    pub(super) fn prepare(request: &mut BuildRequest, temp: &Path, to: &Arc<Sender>, engine: bool) -> Result<Self, Error> {
        let cannot = |error: io::Error| Error::from_chain(Kind::Configuration, &error).while_doing("cannot make a place for the output");
        let mut prepared = vec![];
        for (index, output) in request.outputs.iter_mut().enumerate() {
            match &mut output.kind {
                OutputKind::Image | OutputKind::Registry | OutputKind::CacheOnly => {}
                OutputKind::OciTar(dest) | OutputKind::DockerTar(dest) | OutputKind::Tar(dest) => {
                    let (sending, path) = archive(index, to).map_err(cannot)?;
                    *dest = Dest::Path(path);
                    prepared.push((index, sending));
                }
                OutputKind::Load if engine => prepared.push((index, Sending::Nothing)),
                // The caller loads it, or makes a layout of it.
                OutputKind::Load => {
                    let (sending, path) = archive(index, to).map_err(cannot)?;
                    output.kind = OutputKind::DockerTar(Dest::Path(path));
                    prepared.push((index, sending));
                }
                OutputKind::OciDir(_) => {
                    let (sending, path) = archive(index, to).map_err(cannot)?;
                    output.kind = OutputKind::OciTar(Dest::Path(path));
                    prepared.push((index, sending));
                }
                OutputKind::Local(dir) => {
                    let aside = beside::folder_in(temp).map_err(cannot)?;
                    *dir = aside.path().join("files");
                    prepared.push((index, Sending::Folder(aside)));
                }
            }
        }
        // What is kept is kept there, under its names.
        if engine && request.outputs.iter().all(|output| output.kind == OutputKind::Image) {
            request.outputs.push(Output::new(OutputKind::Load));
        }
        Ok(Self(prepared))
    }

    /// Sends the rest.
    pub(super) fn finish(self, report: Result<BuildReport, Error>, to: &Sender) -> Result<BuildReport, Error> {
        let lost = |error: io::Error| Error::from_chain(Kind::Driver, &error).while_doing("the output cannot be sent to the caller");
        for (index, sending) in self.0 {
            match sending {
                Sending::Archive { pipe, sends } => {
                    // Its other end is at the end then.
                    drop(pipe);
                    let sent = sends.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                    if report.is_ok() {
                        sent.map_err(lost)?;
                    }
                }
                Sending::Folder(aside) if report.is_ok() => {
                    let mut out = Pieces::new(|piece| to.send_with(&ToCaller::Data { output: index, bytes: piece.len() }, piece));
                    folder::send(&aside.path().join("files"), Patterns::default(), &mut out).map_err(|error| match error {
                        SendError::Pipe(error) => lost(error),
                        unreadable @ SendError::Read { .. } => Error::from_chain(Kind::Configuration, &unreadable),
                    })?;
                    out.flush().map_err(lost)?;
                }
                Sending::Folder(_) | Sending::Nothing => {}
            }
            if report.is_ok() {
                to.send(&ToCaller::End { output: index }).map_err(lost)?;
            }
        }
        report
    }
}

fn archive(output: usize, to: &Arc<Sender>) -> io::Result<(Sending, PathBuf)> {
    let (mut from, pipe) = io::pipe()?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", pipe.as_raw_fd()));
    let to = Arc::clone(to);
    let sends = std::thread::Builder::new().name("output".into()).spawn(move || {
        let mut piece = vec![0; PIECE];
        loop {
            match from.read(&mut piece) {
                Ok(0) => return Ok(()),
                Ok(read) => to.send_with(&ToCaller::Data { output, bytes: read }, &piece[..read])?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    })?;
    Ok((Sending::Archive { pipe, sends }, path))
}
