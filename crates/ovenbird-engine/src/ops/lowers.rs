//! The lower folders of an overlay mount, never more than the kernel takes.
//!
//! A stack that is too high has its lowest layers merged into plain folders, a round of them at a time. These live as long as the
//! build, so that the many steps above one high stack pay for it once.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use ovenbird_oci::layer::Owners;

use crate::ops::file::FileError;
use crate::ops::merged;
use crate::snapshot::{LayerDir, Snapshot};
use crate::state::{State, StateError, WorkDir};

/// Layers that are merged at once: each may need an open folder.
const ROUND: usize = 160;

/// Why layers could not be merged.
#[derive(Debug, thiserror::Error)]
pub enum LowersError {
    /// Reading or writing files.
    #[error(transparent)]
    File(#[from] FileError),
    /// The state folder.
    #[error(transparent)]
    State(#[from] StateError),
}

/// What was merged for the steps of one build.
#[derive(Debug, Default)]
pub struct Lowers(Mutex<HashMap<Vec<PathBuf>, WorkDir>>);

impl Lowers {
    /// The snapshot's folders, **highest first**; at most `most` (but at least two).
    pub fn of(&self, snapshot: &Snapshot, most: usize, state: &State) -> Result<Vec<PathBuf>, LowersError> {
        let mut dirs: Vec<PathBuf> = snapshot.layers.iter().map(|layer| layer.dir.clone()).collect();
        if dirs.len() > most {
            let round = ROUND.min(most.saturating_sub(1)).max(1);
            // The same length for all steps of a round, so that they share it; at least one layer stays above it.
            let length = (dirs.len() - 1) / round * round;
            let lowest = self.merge(&snapshot.layers[..length], round, state)?;
            dirs.splice(..length, [lowest]);
        }
        dirs.reverse();
        Ok(dirs)
    }

    fn merge(&self, layers: &[Arc<LayerDir>], round: usize, state: &State) -> Result<PathBuf, LowersError> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut below: Option<Arc<LayerDir>> = None;
        for end in (round..=layers.len()).step_by(round) {
            let key: Vec<PathBuf> = layers[..end].iter().map(|layer| layer.dir.clone()).collect();
            let dir = match known.get(&key) {
                Some(work) => work.path().join("fs"),
                None => {
                    let work = state.work_dir()?;
                    let dir = work.subdir("fs")?;
                    let snapshot = Snapshot { layers: below.iter().chain(&layers[end - round..end]).cloned().collect() };
                    // Owners that the disk does not hold are looked up in the layers themselves.
                    merged::materialize(&snapshot, &dir, state.ownership())?;
                    known.insert(key, work);
                    dir
                }
            };
            below = Some(Arc::new(LayerDir::new(dir, Owners::new())));
        }
        Ok(below.map(|layer| layer.dir.clone()).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use ovenbird_sandbox::Level;

    use super::*;

    #[test]
    fn high_stacks_lose_nothing() {
        let root = tempfile::tempdir().unwrap();
        let state = State::open(root.path(), Some(Level::Root)).unwrap();
        let layers: Vec<Arc<LayerDir>> = (0..10)
            .map(|number| {
                let dir = root.path().join(format!("layer-{number}"));
                fs::create_dir_all(dir.join("d")).unwrap();
                fs::write(dir.join(format!("d/{number}")), "").unwrap();
                fs::write(dir.join("same"), number.to_string()).unwrap();
                Arc::new(LayerDir::new(dir, Owners::new()))
            })
            .collect();
        let lowers = Lowers::default();
        for (count, most, want) in [(0, 4, 0), (4, 4, 4), (5, 4, 3), (7, 4, 2), (10, 4, 2), (10, 9, 3), (10, 10, 10), (3, 2, 2)] {
            let snapshot = Snapshot { layers: layers[..count].to_vec() };
            let dirs = lowers.of(&snapshot, most, &state).unwrap();
            assert_eq!(dirs.len(), want, "{count} layers, {most} at most");
            for number in 0..count {
                assert!(dirs.iter().any(|dir| dir.join(format!("d/{number}")).exists()), "{number} of {count}");
            }
            let top = dirs.first().map(|dir| fs::read_to_string(dir.join("same")).unwrap());
            assert_eq!(top, count.checked_sub(1).map(|number| number.to_string()), "{count} layers, {most} at most");
            let again = lowers.of(&snapshot, most, &state).unwrap();
            assert_eq!(dirs, again, "merged once");
        }
    }
}
