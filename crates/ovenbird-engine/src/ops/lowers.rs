//! The lower folders of an overlay mount: never more than the kernel takes, and few of them however many steps there are.
//!
//! A mount and every look-up in it cost the kernel something for each folder, so a long Dockerfile would take time by the square of its
//! length. In a high stack, runs of small layers are merged into one diff folder each; a stack that is still too high has its lowest layers
//! merged into plain folders, a round of them at a time. Both live as long as the build, so that all steps above pay for them once.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use ovenbird_dockerfile::ignore::Patterns;
use ovenbird_oci::layer::Owners;

use crate::ops::file::FileError;
use crate::ops::merged;
use crate::snapshot::folder::Folder;
use crate::snapshot::tree::walk;
use crate::snapshot::{LayerDir, Snapshot};
use crate::state::{State, StateError, WorkDir};

/// Layers that are merged at once: each may need an open folder.
const ROUND: usize = 160;
/// Up to this height it costs more to merge layers than to mount them.
const LOW: usize = 64;
/// Small layers that become one.
const RUN: usize = 32;
/// Most entries of a small layer, and most bytes in them.
const SMALL: (usize, u64) = (64, 1 << 20);

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
pub struct Lowers(Mutex<Merged>);

#[derive(Debug, Default)]
struct Merged {
    /// By the folders that it stands for, lowest first. The lowest may be another merged one.
    folders: HashMap<Vec<PathBuf>, WorkDir>,
    small: HashMap<PathBuf, bool>,
}

impl Lowers {
    /// The snapshot's folders, **highest first**; at most `most` (but at least two).
    pub fn of(&self, snapshot: &Snapshot, most: usize, state: &State) -> Result<Vec<PathBuf>, LowersError> {
        let layers = &snapshot.layers;
        let mut merged = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut dirs = if layers.len() > LOW { merged.runs(layers, state)? } else { dirs_of(layers) };
        if dirs.len() > most {
            dirs = dirs_of(layers);
            let round = ROUND.min(most.saturating_sub(1)).max(1);
            // The same length for all steps of a round, so that they share it; at least one layer stays above it.
            let length = (dirs.len() - 1) / round * round;
            let lowest = merged.lowest(&layers[..length], round, state)?;
            dirs.splice(..length, [lowest]);
        }
        dirs.reverse();
        Ok(dirs)
    }
}

impl Merged {
    /// The folders of a stack, lowest first, with runs of small layers as one.
    fn runs(&mut self, layers: &[Arc<LayerDir>], state: &State) -> Result<Vec<PathBuf>, LowersError> {
        let mut dirs: Vec<PathBuf> = vec![];
        // Where the last merged run is in `dirs`, and where the next one begins in `layers`.
        let (mut last, mut begin) = (0, 0);
        for (at, layer) in layers.iter().enumerate() {
            dirs.push(layer.dir.clone());
            if !self.is_small(&layer.dir)? {
                begin = at + 1;
            } else if at + 1 - begin == RUN {
                // What a diff hides depends on everything below, which the last merged run stands for.
                let dir = self.folder(&dirs[last..], state, |dir| {
                    let all = Snapshot { layers: layers[..=at].to_vec() };
                    merged::squash(&all, begin, dir, state.ownership()).map(drop)
                })?;
                dirs.truncate(dirs.len() - RUN);
                (last, begin) = (dirs.len(), at + 1);
                dirs.push(dir);
            }
        }
        Ok(dirs)
    }

    fn is_small(&mut self, dir: &Path) -> Result<bool, FileError> {
        if let Some(known) = self.small.get(dir) {
            return Ok(*known);
        }
        let (mut entries, mut bytes) = (0, 0);
        for visit in walk(&Folder::new(dir, Patterns::default()).with_owners(), Path::new("")) {
            entries += 1;
            bytes += visit.map_err(FileError::io("read", dir))?.entry.size;
            if entries > SMALL.0 || bytes > SMALL.1 {
                break;
            }
        }
        let small = entries <= SMALL.0 && bytes <= SMALL.1;
        self.small.insert(dir.to_owned(), small);
        Ok(small)
    }

    /// Layers as one plain folder.
    fn lowest(&mut self, layers: &[Arc<LayerDir>], round: usize, state: &State) -> Result<PathBuf, LowersError> {
        let mut below: Option<Arc<LayerDir>> = None;
        for part in layers.chunks(round) {
            let stack: Vec<Arc<LayerDir>> = below.iter().chain(part).cloned().collect();
            let dir = self.folder(&dirs_of(&stack), state, |dir| {
                // Owners that the disk does not hold are looked up in the layers themselves.
                merged::materialize(&Snapshot { layers: stack.clone() }, dir, state.ownership())
            })?;
            below = Some(Arc::new(LayerDir::new(dir, Owners::new())));
        }
        Ok(below.map(|layer| layer.dir.clone()).unwrap_or_default())
    }

    /// The folder that stands for others; made by `fill` when it is new.
    fn folder(&mut self, of: &[PathBuf], state: &State, fill: impl FnOnce(&Path) -> Result<(), FileError>) -> Result<PathBuf, LowersError> {
        if let Some(work) = self.folders.get(of) {
            return Ok(work.path().join("fs"));
        }
        let work = state.work_dir()?;
        let dir = work.subdir("fs")?;
        fill(&dir)?;
        self.folders.insert(of.to_vec(), work);
        Ok(dir)
    }
}

fn dirs_of(layers: &[Arc<LayerDir>]) -> Vec<PathBuf> {
    layers.iter().map(|layer| layer.dir.clone()).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use ovenbird_sandbox::Level;
    use rustix::fs::{FileType, Mode, XattrFlags};

    use super::*;
    use crate::snapshot::view::OPAQUE;

    /// A small diff: files come, change, vanish and become folders, and folders hide what was below.
    fn small_diff(dir: &Path, number: usize) {
        let name = |number: usize| dir.join(format!("d{}/f{}", number % 3, number % 7));
        let whiteout = |path: &Path| {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            rustix::fs::mknodat(rustix::fs::CWD, path, FileType::CharacterDevice, Mode::empty(), 0).unwrap();
        };
        match number % 11 {
            5 => whiteout(&name(number + 4)),
            7 => whiteout(&dir.join(format!("d{}", number % 3))),
            8 => {
                fs::create_dir_all(name(number)).unwrap();
                fs::write(name(number).join("below"), "").unwrap();
            }
            9 => {
                fs::create_dir_all(dir.join("d1")).unwrap();
                fs::write(dir.join("d1/new"), number.to_string()).unwrap();
                rustix::fs::setxattr(dir.join("d1"), OPAQUE, b"y", XattrFlags::empty()).unwrap();
            }
            _ => {
                fs::create_dir_all(name(number).parent().unwrap()).unwrap();
                fs::write(name(number), number.to_string()).unwrap();
            }
        }
    }

    #[test]
    fn runs_of_small_layers_are_one_and_say_the_same() {
        let root = tempfile::tempdir().unwrap();
        let state = State::open(root.path(), Some(Level::Root)).unwrap();
        let large = |number: usize| [0, 40, 41].contains(&number);
        let layers: Vec<Arc<LayerDir>> = (0..180)
            .map(|number| {
                let dir = root.path().join(format!("layer-{number}"));
                fs::create_dir_all(&dir).unwrap();
                if large(number) {
                    fs::write(dir.join("large"), vec![number as u8; 1 + SMALL.1 as usize]).unwrap();
                } else {
                    small_diff(&dir, number);
                }
                Arc::new(LayerDir::new(dir, Owners::new()))
            })
            .collect();
        let tar = |layers: Vec<Arc<LayerDir>>| {
            let mut bytes = vec![];
            merged::write_tar(&Snapshot { layers }, &mut bytes, Some(0)).unwrap();
            bytes
        };
        let lowers = Lowers::default();
        // 1 large, 32 as one, 7, 2 large, then runs of 32 and what is left.
        for (count, want) in [(64, 64), (65, 34), (73, 42), (74, 12), (105, 43), (106, 13), (180, 25)] {
            let snapshot = Snapshot { layers: layers[..count].to_vec() };
            let dirs = lowers.of(&snapshot, 500, &state).unwrap();
            assert_eq!(dirs.len(), want, "{count} layers");
            let fewer = dirs.iter().rev().map(|dir| Arc::new(LayerDir::new(dir, Owners::new()))).collect();
            assert!(tar(fewer) == tar(snapshot.layers.clone()), "{count} layers");
            assert_eq!(dirs, lowers.of(&snapshot, 500, &state).unwrap(), "merged once");
        }
        assert_eq!(lowers.0.lock().unwrap().folders.len(), 5);
    }

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
