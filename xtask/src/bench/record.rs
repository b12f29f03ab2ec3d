//! Results as they are kept: `docs/benchmarks/results.json`, from which the page beside it is written.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::bound::Bound;
use super::growth::Curve;
use super::machine::About;
use super::measure::{Sample, median};
use super::peer::OVENBIRD;
use super::{machine, page};

/// Version of the file.
const FORMAT: u32 = 1;

/// Everything measured; a later run replaces the cases that it measured and keeps the others.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Records {
    #[serde(default)]
    pub(super) format: u32,
    /// The machine, in words.
    #[serde(default)]
    pub(super) machine: String,
    /// Builders that were not there, and why.
    #[serde(default)]
    pub(super) missing: Vec<(String, String)>,
    pub(super) cases: Vec<Entry>,
    pub(super) growths: Vec<Curve>,
}

/// One measured thing, all builders in one run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Entry {
    pub(super) measure: String,
    /// Day.
    pub(super) date: String,
    /// Load average when it began.
    pub(super) load: String,
    pub(super) bound: Option<Bound>,
    pub(super) rows: Vec<Row>,
    /// Builders that could not do it, and how they failed.
    pub(super) failed: Vec<(String, String)>,
}

/// One builder's results.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Row {
    pub(super) builder: String,
    pub(super) seconds: Vec<f64>,
    pub(super) memory: Vec<u64>,
}

impl Row {
    pub(super) fn median(&self) -> f64 {
        median(&self.seconds)
    }

    /// Largest of all runs.
    pub(super) fn peak(&self) -> u64 {
        self.memory.iter().copied().max().unwrap_or(0)
    }
}

impl Entry {
    /// Without results yet.
    pub(super) fn new(measure: &str, load: &str, bound: Option<Bound>) -> Self {
        Self { measure: measure.into(), date: machine::date(), load: load.into(), bound, rows: vec![], failed: vec![] }
    }

    /// One more result.
    pub(super) fn add(&mut self, builder: &str, sample: Sample) {
        let index = self.rows.iter().position(|row| row.builder == builder).unwrap_or_else(|| {
            self.rows.push(Row { builder: builder.into(), seconds: vec![], memory: vec![] });
            self.rows.len() - 1
        });
        self.rows[index].seconds.push(sample.seconds);
        self.rows[index].memory.push(sample.memory);
    }

    /// Our own results.
    pub(super) fn own(&self) -> Option<&Row> {
        self.rows.iter().find(|row| row.builder == OVENBIRD)
    }

    /// Everybody else's.
    pub(super) fn others(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(|row| row.builder != OVENBIRD)
    }
}

/// Adds a run to what is kept and writes the page anew.
pub(super) fn keep(folder: &Path, about: &About, new: &Records, missing: &[(String, String)]) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("cannot keep the results in {}: {error}", folder.display());
    fs::create_dir_all(folder).map_err(failed)?;
    let file = folder.join("results.json");
    let mut kept = match fs::read(&file) {
        Ok(bytes) => serde_json::from_slice::<Records>(&bytes)
            .ok()
            .filter(|records| records.format == FORMAT)
            .ok_or(format!("{} is of another format: remove it and measure all cases again", file.display()))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Records::default(),
        Err(error) => return Err(failed(error)),
    };
    kept.format = FORMAT;
    kept.machine = about.describe();
    // Those left out by --peers are on the page already, or will be.
    kept.missing = missing.iter().filter(|(_, reason)| !reason.contains("not asked for")).cloned().collect();
    for entry in new.cases.iter().cloned() {
        kept.cases.retain(|old| old.measure != entry.measure);
        kept.cases.push(entry);
    }
    for curve in new.growths.iter().cloned() {
        kept.growths.retain(|old| old.name != curve.name);
        kept.growths.push(curve);
    }
    kept.growths.sort_by(|a, b| a.name.cmp(&b.name));
    let json = serde_json::to_string_pretty(&kept).map_err(|error| format!("cannot write the results: {error}"))?;
    fs::write(&file, json + "\n").map_err(failed)?;
    fs::write(folder.join("results.md"), page::document(&kept)).map_err(failed)
}
