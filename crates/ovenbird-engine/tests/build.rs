//! Whole builds through the engine's own interface: what runs, what is taken from the cache, what fails and how.
//! Steps that need a sandbox are covered by the literate cases; these need nothing from the machine.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::{Arc, Mutex};

use ovenbird_dockerfile::ignore::Patterns;
use ovenbird_engine::frontend::{NoCache, Options};
use ovenbird_engine::input::LocalContext;
use ovenbird_engine::{
    Budget, BuildError, BuildInput, BuildOutput, CacheKind, Cancel, Engine, EngineOptions, ErrorKind, Event, EventSink, PruneOptions,
};
use ovenbird_oci::registry::{Client, ClientOptions};
use ovenbird_oci::{Descriptor, ImageConfig, Manifest, Platform};

/// What somebody does to the context when a step starts: after the files were looked at, before they are copied.
type Meddler = Box<dyn Fn() + Send + Sync>;

#[derive(Default)]
struct Recorder(Mutex<Vec<Event>>, Mutex<Option<Meddler>>);

impl EventSink for Recorder {
    fn emit(&self, event: Event) {
        if matches!(event, Event::Started { .. })
            && let Some(meddle) = self.1.lock().unwrap().take()
        {
            meddle();
        }
        self.0.lock().unwrap().push(event);
    }
}

struct Bench {
    root: tempfile::TempDir,
    context: tempfile::TempDir,
    ignore: &'static str,
    options: Options,
    epoch: Option<i64>,
    events: Arc<Recorder>,
}

impl Bench {
    fn new(files: &[(&str, &str)]) -> Self {
        let bench = Self {
            root: tempfile::tempdir().unwrap(),
            context: tempfile::tempdir().unwrap(),
            ignore: "",
            options: Options::default(),
            epoch: None,
            events: Arc::default(),
        };
        for (path, content) in files {
            bench.write(path, content);
        }
        bench
    }

    fn write(&self, path: &str, content: &str) {
        let path = self.context.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    fn engine(&self) -> Engine {
        self.engine_at(None)
    }

    fn engine_at(&self, level: Option<ovenbird_sandbox::Level>) -> Engine {
        let client = Client::new(ClientOptions::default());
        Engine::open(EngineOptions { root: self.root.path().into(), level, overlay: false, client }).unwrap()
    }

    fn build(&self, dockerfile: &str) -> Result<BuildOutput, BuildError> {
        self.build_with(&self.engine(), dockerfile)
    }

    fn build_with(&self, engine: &Engine, dockerfile: &str) -> Result<BuildOutput, BuildError> {
        self.events.0.lock().unwrap().clear();
        let context = LocalContext::new(self.context.path(), Patterns::parse(self.ignore).unwrap());
        let input = BuildInput {
            dockerfile: dockerfile.into(),
            contexts: BTreeMap::from([("context".into(), context)]),
            options: vec![self.options.clone()],
            source_date_epoch: self.epoch,
            ..BuildInput::default()
        };
        engine.build(&input, &(self.events.clone() as Arc<dyn EventSink>), &Cancel::default())
    }

    fn manifest(engine: &Engine, output: &BuildOutput) -> Manifest {
        serde_json::from_slice(&engine.store().read(&output.target.digest).unwrap()).unwrap()
    }

    fn config(&self, output: &BuildOutput) -> (Manifest, ImageConfig) {
        let engine = self.engine();
        let manifest = Self::manifest(&engine, output);
        let config = serde_json::from_slice(&engine.store().read(&manifest.config.digest).unwrap()).unwrap();
        (manifest, config)
    }
}

const TWO_STAGES: &str =
    "FROM scratch AS a\nCOPY x /x\nFROM scratch AS unused\nCOPY nothing-here /\nFROM scratch\nCOPY --from=a /x /y\nCOPY z /z\n";

#[test]
fn an_unchanged_build_runs_nothing_and_gives_the_same_layers() {
    let bench = Bench::new(&[("x", "1"), ("z", "2")]);
    let first = bench.build(TWO_STAGES).unwrap();
    assert_eq!((first.ran, first.cached), (3, 0), "the unused stage must not run");
    let second = bench.build(TWO_STAGES).unwrap();
    assert_eq!((second.ran, second.cached), (0, 3));
    let (a, b) = (bench.config(&first), bench.config(&second));
    assert_eq!(a.0.layers, b.0.layers);
    assert_eq!(first.target, second.target, "the times of the image are those of its steps");
    assert_eq!(a.1.rootfs.diff_ids.len(), 2);
    assert_eq!(a.1.history.iter().filter(|h| !h.empty_layer).count(), 2);
}

#[test]
fn the_cache_follows_content_not_time() {
    let bench = Bench::new(&[("x", "1"), ("z", "2")]);
    bench.build(TWO_STAGES).unwrap();
    bench.write("x", "1");
    assert_eq!(bench.build(TWO_STAGES).unwrap().ran, 0, "same content, new mtime");
    bench.write("other", "not copied");
    assert_eq!(bench.build(TWO_STAGES).unwrap().ran, 0, "a file that nothing copies");
    bench.write("z", "3");
    assert_eq!(bench.build(TWO_STAGES).unwrap().ran, 1, "only the last COPY");
    bench.write("x", "4");
    assert_eq!(bench.build(TWO_STAGES).unwrap().ran, 3, "everything behind x");
}

#[test]
fn hard_links_are_part_of_the_key() {
    let bench = Bench::new(&[("d/a", "1"), ("d/b", "1")]);
    let dockerfile = "FROM scratch\nCOPY d /d\n";
    let apart = bench.build(dockerfile).unwrap();
    let place = |name: &str| bench.context.path().join("d").join(name);
    std::fs::remove_file(place("b")).unwrap();
    std::fs::hard_link(place("a"), place("b")).unwrap();
    let linked = bench.build(dockerfile).unwrap();
    assert_eq!((linked.ran, linked.cached), (1, 0));
    assert_ne!(bench.config(&apart).0.layers, bench.config(&linked).0.layers);
    // A name outside of what is copied says nothing.
    std::fs::remove_file(place("b")).unwrap();
    std::fs::write(place("b"), "1").unwrap();
    std::fs::hard_link(place("b"), bench.context.path().join("elsewhere")).unwrap();
    assert_eq!(bench.build(dockerfile).unwrap().target, apart.target);
}

#[test]
fn a_stage_rebuilt_with_the_same_outcome_changes_nothing_behind_it() {
    let bench = Bench::new(&[("x", "1"), ("z", "2"), ("x2", "1")]);
    let first = bench.build(TWO_STAGES).unwrap();
    let changed = TWO_STAGES.replace("COPY x /x", "COPY x2 /x");
    let second = bench.build(&changed).unwrap();
    assert_eq!((second.ran, second.cached), (1, 2));
    assert_eq!(bench.config(&first).0.layers, bench.config(&second).0.layers);
}

#[test]
fn no_cache_runs_again_and_files_the_new_result() {
    let mut bench = Bench::new(&[("x", "1"), ("z", "2")]);
    bench.build(TWO_STAGES).unwrap();
    bench.options.no_cache = NoCache::All;
    assert_eq!(bench.build(TWO_STAGES).unwrap().ran, 3);
    bench.options.no_cache = NoCache::Stages(vec!["a".into()]);
    assert_eq!(bench.build(TWO_STAGES).unwrap().ran, 1, "the copy from it is compared by content");
    bench.options.no_cache = NoCache::Off;
    assert_eq!(bench.build(TWO_STAGES).unwrap().ran, 0);
}

#[test]
fn files_that_change_before_they_are_copied_poison_no_cache() {
    let edits: [(&str, fn(&Path)); 4] = [
        ("written", |file| std::fs::write(file, "new").unwrap()),
        ("replaced", |file| {
            std::fs::write(file.with_extension("n"), "new").unwrap();
            std::fs::rename(file.with_extension("n"), file).unwrap();
        }),
        ("another mode", |file| std::fs::set_permissions(file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap()),
        ("written and back", |file| {
            std::fs::write(file, "new").unwrap();
            std::thread::sleep(std::time::Duration::from_millis(30));
            std::fs::write(file, "old").unwrap();
        }),
    ];
    for (what, edit) in edits {
        let bench = Bench::new(&[("d/x", "old")]);
        let file = bench.context.path().join("d/x");
        // Old enough to be remembered.
        std::thread::sleep(std::time::Duration::from_millis(50));
        let meddled = file.clone();
        *bench.events.1.lock().unwrap() = Some(Box::new(move || edit(&meddled)));
        let first = bench.build("FROM scratch AS a\nCOPY d /d\nFROM a\nCOPY --from=a /d /e\n").unwrap();
        assert_eq!(first.ran, 2, "{what}");
        let warned =
            bench.events.0.lock().unwrap().iter().any(|event| matches!(event, Event::Warning { code, .. } if code == "context-changed"));
        assert!(warned, "{what}");
        // Nothing of it is in the cache.
        std::fs::write(&file, "old").unwrap();
        std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
        let again = bench.build("FROM scratch AS a\nCOPY d /d\nFROM a\nCOPY --from=a /d /e\n").unwrap();
        assert_eq!(again.ran, 2, "{what}");
    }
}

#[test]
fn reproducible_means_the_same_digest_anywhere() {
    let digests: Vec<_> = (0..2)
        .map(|_| {
            let mut bench = Bench::new(&[("x", "1"), ("z", "2")]);
            bench.epoch = Some(1_700_000_000);
            bench.build(TWO_STAGES).unwrap().target.digest
        })
        .collect();
    assert_eq!(digests[0], digests[1]);
    let bench = Bench::new(&[("x", "1"), ("z", "2")]);
    let dated = bench.build(&format!("ARG SOURCE_DATE_EPOCH=1700000000\n{TWO_STAGES}")).unwrap();
    assert_eq!(dated.target.digest, digests[0], "the Dockerfile's own default counts");
    let undated = bench.build(&format!("ARG SOURCE_DATE_EPOCH=context\n{TWO_STAGES}")).unwrap();
    assert_ne!(undated.target.digest, digests[0], "a folder has no time");
    let error = bench.build(&format!("ARG SOURCE_DATE_EPOCH=yesterday\n{TWO_STAGES}")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Dockerfile);
}

#[test]
fn prune_leaves_a_state_that_builds() {
    let bench = Bench::new(&[("x", "1"), ("z", "2")]);
    let first = bench.build(TWO_STAGES).unwrap();
    let layers = bench.config(&first).0.layers.len();
    let engine = bench.engine();
    let before = engine.disk_usage().unwrap();
    let report = engine.prune(&PruneOptions { all: true, ..PruneOptions::default() }).unwrap();
    assert!(report.removed >= 5 && engine.disk_usage().unwrap().total() < before.total(), "{report:?}");
    drop(engine);
    let again = bench.build(TWO_STAGES).unwrap();
    assert_eq!(again.ran, 3);
    assert_eq!(bench.config(&again).0.layers.len(), layers);
}

#[test]
fn prune_is_about_every_level() {
    use ovenbird_sandbox::Level;
    let bench = Bench::new(&[("x", "1"), ("z", "2")]);
    let names = |dir: &str| std::fs::read_dir(bench.root.path().join(dir)).unwrap().count();
    bench.build(TWO_STAGES).unwrap();
    let snapshots = names("recorded/snapshots");
    assert!(snapshots > 0);
    for level in [Level::SingleId, Level::Rootless, Level::Root] {
        let engine = bench.engine_at(Some(level));
        let usage = engine.disk_usage().unwrap();
        assert!(usage.snapshots > 0, "{level:?}");
        // What a cache record of another level needs stays.
        engine.prune(&PruneOptions { filter_until: Some(std::time::Duration::from_hours(1)), ..PruneOptions::default() }).unwrap();
        assert_eq!(names("recorded/snapshots"), snapshots, "{level:?}");
        drop(engine);
        assert_eq!(bench.build(TWO_STAGES).unwrap().ran, 0, "{level:?}");
    }
    for level in [Level::SingleId, Level::Rootless, Level::Root] {
        bench.build(TWO_STAGES).unwrap();
        std::fs::create_dir_all(bench.root.path().join("recorded/mounts/m")).unwrap();
        bench.engine_at(Some(level)).prune(&PruneOptions { all: true, ..PruneOptions::default() }).unwrap();
        for dir in ["snapshots", "cache", "traces", "mounts", "tmp"] {
            assert_eq!(names(&format!("recorded/{dir}")), 0, "{level:?} {dir}");
        }
        assert_eq!(names("store/blobs/sha256"), 0, "{level:?}");
    }
}

#[test]
fn prune_takes_what_was_used_longest_ago() {
    use std::time::{Duration, SystemTime};
    let bench = Bench::new(&[("x", "1"), ("z", "2")]);
    let named = |dockerfile: &str, name: &str| {
        let built = bench.build(dockerfile).unwrap();
        bench.engine().store().tag(&name.parse().unwrap(), &built.target).unwrap();
    };
    named(TWO_STAGES, "old");
    let root = bench.root.path();
    std::fs::write(root.join("recorded/traces/of-another"), "").unwrap();
    let old = SystemTime::now() - Duration::from_hours(100);
    for dir in ["recorded/cache", "recorded/traces", "store/images"] {
        for entry in std::fs::read_dir(root.join(dir)).unwrap().flatten() {
            std::fs::File::options().write(true).open(entry.path()).unwrap().set_modified(old).unwrap();
        }
    }
    named("FROM scratch\nCOPY z /new\n", "new");
    let names = || bench.engine().store().images().unwrap().iter().map(|(name, _)| name.familiar()).collect::<Vec<_>>();
    let prune = |all, keep_bytes, hours: Option<u64>| {
        let budget = Budget { max_used: keep_bytes, ..Budget::default() };
        let options = PruneOptions { all, budget, filter_until: hours.map(Duration::from_hours), ..PruneOptions::default() };
        bench.engine().prune(&options).unwrap().bytes
    };
    let traces = || {
        let names = std::fs::read_dir(root.join("recorded/traces")).unwrap().flatten().map(|entry| entry.file_name());
        names.filter(|name| !name.to_string_lossy().starts_with("files-")).count()
    };
    let traced = traces();
    assert_eq!((prune(true, None, Some(200)), names()), (0, vec!["new:latest".to_owned(), "old:latest".into()]));
    let whole = bench.engine().disk_usage().unwrap().total();
    assert_eq!(prune(true, Some(whole), None), 0);
    assert!(prune(true, Some(whole - 1), None) > 0);
    assert!(bench.engine().disk_usage().unwrap().total() < whole);
    prune(true, None, Some(24));
    assert_eq!(names(), ["new:latest"], "the old name went by its age");
    assert!((1..traced).contains(&traces()) && !root.join("recorded/traces/of-another").exists());
    assert_eq!(bench.build("FROM scratch\nCOPY z /new\n").unwrap().ran, 0, "the young record stayed");
    prune(true, None, None);
    assert_eq!((names(), traces()), (vec![], 0));
}

/// What a build that lives uses, and nothing else, outlasts a prune of everything.
#[test]
fn prune_leaves_what_is_in_use() {
    let bench = Bench::new(&[("x", "1"), ("z", "2")]);
    let other = "FROM scratch\nCOPY z /other\n";
    bench.build(other).unwrap();
    bench.build(TWO_STAGES).unwrap();
    let everything = PruneOptions { all: true, ..PruneOptions::default() };
    let running = bench.engine();
    let built = bench.build_with(&running, TWO_STAGES).unwrap();
    assert_eq!(built.ran, 0);
    running.store().tag(&"used".parse().unwrap(), &built.target).unwrap();
    let report = bench.engine().prune(&everything).unwrap();
    assert!(report.removed > 0 && report.in_use > 3, "{report:?}");
    assert_eq!(bench.build_with(&running, TWO_STAGES).unwrap().ran, 0);
    assert_eq!(running.store().images().unwrap().len(), 1);
    for digest in bench.config(&built).0.layers.iter().map(|layer| layer.digest) {
        running.store().verify(&digest).unwrap();
    }
    assert_eq!(bench.build(other).unwrap().ran, 1, "what nobody used went");
    drop(running);
    let report = bench.engine().prune(&everything).unwrap();
    assert_eq!((report.in_use, bench.engine().store().blobs().unwrap().len()), (0, 0), "{report:?}");
    assert_eq!(bench.build(TWO_STAGES).unwrap().ran, 3);
}

/// Builds in a row, each an engine of its own, beside prunes: none finds anything gone that it was told was there.
#[test]
fn builds_and_prunes_at_once() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let mut bench = Bench::new(&[("x", "1"), ("z", "2")]);
    bench.epoch = Some(1_700_000_000);
    let expect = bench.build(TWO_STAGES).unwrap().target.digest;
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let builds = [(); 3].map(|()| {
            scope.spawn(|| {
                for _ in 0..40 {
                    let engine = bench.engine();
                    let built = bench.build_with(&engine, TWO_STAGES).unwrap();
                    assert_eq!(built.target.digest, expect);
                    for layer in Bench::manifest(&engine, &built).layers {
                        engine.store().verify(&layer.digest).unwrap();
                    }
                }
            })
        });
        for all in [true, false] {
            let (bench, ended) = (&bench, &ended);
            scope.spawn(move || {
                while !ended.load(Ordering::Relaxed) {
                    bench.engine().prune(&PruneOptions { all, ..PruneOptions::default() }).unwrap();
                }
            });
        }
        let joined = builds.map(std::thread::ScopedJoinHandle::join);
        ended.store(true, Ordering::Relaxed);
        if let Some(panic) = joined.into_iter().find_map(Result::err) {
            std::panic::resume_unwind(panic);
        }
    });
}

#[test]
fn prune_reads_manifests_as_they_come() {
    let bench = Bench::new(&[("x", "1"), ("z", "2")]);
    let engine = bench.engine();
    let built = bench.build_with(&engine, TWO_STAGES).unwrap();
    let spaced = [b"\n  ".to_vec(), engine.store().read(&built.target.digest).unwrap()].concat();
    let digest = engine.store().write(&spaced).unwrap();
    engine.store().tag(&"spaced".parse().unwrap(), &Descriptor { digest, size: spaced.len() as u64, ..built.target.clone() }).unwrap();
    drop(engine);
    bench.engine().prune(&PruneOptions::default()).unwrap();
    let (manifest, _) = bench.config(&BuildOutput { target: Descriptor { digest, ..built.target.clone() }, ..built });
    assert!(manifest.layers.iter().all(|layer| bench.engine().store().holds(layer)));
}

#[test]
fn prune_by_kind_and_id() {
    let bench = Bench::new(&[("x", "1"), ("z", "2")]);
    bench.build(TWO_STAGES).unwrap();
    let mount = bench.root.path().join("recorded/mounts/0123abcd");
    let make_mount = || {
        std::fs::create_dir_all(mount.join("0")).unwrap();
        std::fs::write(bench.root.path().join("contexts.stat"), "x").unwrap();
    };
    make_mount();
    let entries = || bench.engine().cache_entries().unwrap();
    assert_eq!((entries().len(), entries().iter().filter(|entry| entry.kind == CacheKind::CacheMount).count()), (4, 1));
    assert!(entries().iter().all(|entry| entry.size > 0 && !entry.in_use));
    let prune = |kinds: &[CacheKind], ids: &[&str]| {
        let ids = ids.iter().map(|id| (*id).to_owned()).collect();
        let options = PruneOptions { kinds: kinds.iter().copied().collect(), ids, ..PruneOptions::default() };
        bench.engine().prune(&options).unwrap().removed
    };
    assert_eq!(prune(&[CacheKind::CacheMount], &["x"]), 0);
    assert_eq!(prune(&[], &["0123"]), 1);
    assert!(!mount.exists());
    make_mount();
    assert_eq!(prune(&[CacheKind::CacheMount], &[]), 1);
    assert!(!mount.exists() && bench.root.path().join("contexts.stat").exists());
    assert_eq!(prune(&[CacheKind::SourceLocal], &[]), 1);
    assert!(!bench.root.path().join("contexts.stat").exists());
    let last = entries().pop().unwrap();
    assert!(prune(&[], &[&last.id]) > 0);
    assert_eq!((entries().len(), entries().contains(&last)), (2, false));
    make_mount();
    assert!(prune(&[CacheKind::Regular], &[]) > 0);
    assert_eq!((entries().len(), mount.exists()), (1, true));
}

#[test]
fn a_snapshot_removed_behind_our_back_is_built_again() {
    let bench = Bench::new(&[("x", "1"), ("z", "2")]);
    bench.build(TWO_STAGES).unwrap();
    for dir in std::fs::read_dir(bench.root.path().join("recorded/snapshots")).unwrap().flatten().skip(1) {
        std::fs::remove_dir_all(dir.path()).unwrap();
    }
    assert!(bench.build(TWO_STAGES).unwrap().ran > 0);
    assert_eq!(bench.build(TWO_STAGES).unwrap().ran, 0);
}

#[test]
fn a_flipped_byte_in_a_layer_blob_is_not_exported() {
    let bench = Bench::new(&[("x", "1"), ("z", "2")]);
    let built = bench.build(TWO_STAGES).unwrap();
    let layer = bench.config(&built).0.layers[0].digest;
    let path = bench.root.path().join("store/blobs/sha256").join(layer.hex());
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, bytes).unwrap();
    let out = bench.root.path().join("out.tar");
    let engine = bench.engine();
    let form = ovenbird_engine::Export::OciTar(ovenbird_engine::PathOrStdout::Path(out.clone()));
    let sink = bench.events.clone() as Arc<dyn EventSink>;
    let error = engine.export(&built.target, &form, &[], None, &sink, &Cancel::default()).unwrap_err();
    assert!(error.to_string().contains("corrupt"), "{error}");
    assert!(!out.exists());
    let left = std::fs::read_dir(bench.root.path()).unwrap().filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().starts_with('.'));
    assert_eq!(left.count(), 0, "nothing is left beside it");
}

#[test]
fn a_layer_cut_short_is_named_and_packed_again() {
    let bench = Bench::new(&[("x", "1"), ("z", "2")]);
    let built = bench.build(TWO_STAGES).unwrap();
    let layer = bench.config(&built).0.layers[0].clone();
    let path = bench.root.path().join("store/blobs/sha256").join(layer.digest.hex());
    let out = bench.root.path().join("out.tar");
    let form = ovenbird_engine::Export::OciTar(ovenbird_engine::PathOrStdout::Path(out));
    let sink = bench.events.clone() as Arc<dyn EventSink>;
    for size in [0, 5] {
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, vec![b'x'; size]).unwrap();
        let error = bench.engine().export(&built.target, &form, &[], None, &sink, &Cancel::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Configuration);
        let text = error.to_string();
        assert!(text.contains(&layer.digest.to_string()) && text.contains("is damaged") && text.contains("build it again"), "{text}");
        assert_eq!(bench.build(TWO_STAGES).unwrap().target, built.target);
        bench.engine().store().verify(&layer.digest).unwrap();
        bench.engine().export(&built.target, &form, &[], None, &sink, &Cancel::default()).unwrap();
    }
}

/// An OCI layout in a folder, of an index of one image; `change` breaks it.
fn layout(dir: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    use serde_json::json;
    let put = |media_type: &str, bytes: &[u8]| {
        let digest = ovenbird_oci::Digest::of(bytes);
        std::fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
        std::fs::write(dir.join("blobs/sha256").join(digest.hex()), bytes).unwrap();
        json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
    };
    let tar = vec![0; 1024];
    let mut parts = json!({
        "config": {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [ovenbird_oci::Digest::of(&tar)]}},
        "layer": put("application/vnd.oci.image.layer.v1.tar", &tar),
        "platforms": [Platform::host()],
        "depth": 0,
    });
    change(&mut parts);
    let config = put("application/vnd.oci.image.config.v1+json", parts["config"].to_string().as_bytes());
    let manifest = json!({"schemaVersion": 2, "config": config, "layers": [parts["layer"]]});
    let manifest = put("application/vnd.oci.image.manifest.v1+json", manifest.to_string().as_bytes());
    let entries: Vec<_> = parts["platforms"]
        .as_array()
        .unwrap()
        .iter()
        .map(|platform| {
            let mut entry = manifest.clone();
            if !platform.is_null() {
                entry["platform"] = platform.clone();
            }
            entry
        })
        .collect();
    let index = "application/vnd.oci.image.index.v1+json";
    let mut top = put(index, json!({"schemaVersion": 2, "mediaType": index, "manifests": entries}).to_string().as_bytes());
    for _ in 0..parts["depth"].as_u64().unwrap() {
        top = put(index, json!({"schemaVersion": 2, "mediaType": index, "manifests": [top]}).to_string().as_bytes());
    }
    std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    std::fs::write(dir.join("index.json"), json!({"schemaVersion": 2, "manifests": [top]}).to_string()).unwrap();
}

#[test]
fn layouts_are_sources_whatever_is_wrong_with_them() {
    use serde_json::{Value, json};
    type Change = fn(&mut Value);
    let rows: &[(Change, Result<(), &str>)] = &[
        (|_| {}, Ok(())),
        (|p| p["depth"] = json!(4), Ok(())),
        (|p| p["depth"] = json!(5), Err("more than 4 in each other")),
        (|p| p["platforms"] = json!([null, null]), Err("it has 2 manifests without a platform")),
        (|p| p["platforms"] = json!([{"os": "unknown", "architecture": "unknown"}]), Err("it has 1 attestation;")),
        (|p| p["layer"]["mediaType"] = json!("application/evil"), Err("\"application/evil\", which is no layer of files")),
        (|p| p["layer"]["size"] = json!(5), Err("hashes to")),
        (|p| p["layer"]["digest"] = json!(ovenbird_oci::Digest::of(b"")), Err("is missing")),
        (|p| p["layer"]["digest"] = json!("md5:abc"), Err("cannot be understood")),
        (|p| p["config"]["rootfs"]["diff_ids"] = json!([]), Err("1 layers but 0 diff ids")),
        (|p| p["config"]["config"] = json!("x"), Err("its config is malformed")),
        (|p| p["config"]["rootfs"]["diff_ids"] = json!([ovenbird_oci::Digest::of(b"other")]), Err("hashes to")),
    ];
    for (at, (change, expected)) in rows.iter().enumerate() {
        let bench = Bench::new(&[]);
        let dir = tempfile::tempdir().unwrap();
        layout(dir.path(), change);
        let image = format!("oci-layout://{}", dir.path().display());
        let mut options = bench.options.clone();
        options.contexts.insert("base".into(), ovenbird_engine::frontend::NamedContext::Image(image));
        let bench = Bench { options, ..bench };
        // WORKDIR reads the base, so that its layers are unpacked.
        let built = bench.build("FROM base\nWORKDIR /w\n");
        match (built, expected) {
            (Ok(_), Ok(())) => {}
            (Err(error), Err(text)) => {
                assert_eq!(error.kind(), ErrorKind::Source, "{at}: {error}");
                assert!(error.to_string().contains(text), "{at}: {error}");
            }
            (built, _) => panic!("{at}: {built:?}"),
        }
    }
    let mut bench = Bench::new(&[]);
    bench.options.contexts.insert("base".into(), ovenbird_engine::frontend::NamedContext::Image("oci-layout:///nowhere".into()));
    assert_eq!(bench.build("FROM base\n").unwrap_err().kind(), ErrorKind::Source);
}

#[test]
fn errors_have_a_kind_and_name_the_cause() {
    let bench = Bench::new(&[("x", "1"), ("hidden", "2")]);
    std::os::unix::fs::symlink("/no/where", bench.context.path().join("out")).unwrap();
    let rows: &[(&str, ErrorKind, &str)] = &[
        ("FROM scratch\nCOPY missing /\n", ErrorKind::Source, "missing"),
        ("FROM scratch\nCOPY hiden /\n", ErrorKind::Source, "did you mean \"/hidden\"?"),
        ("FROM scratch\nCOPY out /\n", ErrorKind::Source, "\"/out\" is a symbolic link to \"/no/where\""),
        ("FROM scratch\nCPOY x /\n", ErrorKind::Dockerfile, "error"),
        ("", ErrorKind::Dockerfile, "error"),
        ("FROM scratch\nRUN true\n", ErrorKind::Sandbox, "doctor"),
        ("FROM localhost:1/a AS b\nFROM b AS a\n", ErrorKind::Registry, "localhost:1/a"),
        ("FROM localhost:1/none\nCOPY x /\n", ErrorKind::Registry, "localhost:1/none"),
        ("FROM scratch\nCOPY --from=localhost:1/nowhere x /\n", ErrorKind::Registry, "localhost:1/nowhere"),
    ];
    for (dockerfile, kind, text) in rows {
        let error = bench.build(dockerfile).unwrap_err();
        assert_eq!(error.kind(), *kind, "{dockerfile}: {error}");
        assert!(error.to_string().contains(text), "{dockerfile}: {error}");
    }
}

#[test]
fn a_cancelled_build_says_so() {
    let bench = Bench::new(&[("x", "1")]);
    let cancel = Cancel::default();
    cancel.cancel();
    let input = BuildInput { dockerfile: "FROM scratch\nCOPY x /\n".into(), options: vec![bench.options.clone()], ..BuildInput::default() };
    let error = bench.engine().build(&input, &(bench.events.clone() as Arc<dyn EventSink>), &cancel).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
}

#[test]
fn hidden_files_are_not_copied() {
    let mut bench = Bench::new(&[("keep", "1"), ("drop.log", "2")]);
    bench.ignore = "*.log\n";
    let built = bench.build("FROM scratch\nCOPY . /\n").unwrap();
    bench.ignore = "*.log\nother\n";
    bench.write("drop.log", "changed");
    assert_eq!(bench.build("FROM scratch\nCOPY . /\n").unwrap().ran, 0, "an ignored file is no input");
    let error = bench.build("FROM scratch\nCOPY drop.log /\n").unwrap_err();
    assert!(error.to_string().contains("dockerignore (pattern \"*.log\")"), "{error}");
    assert_eq!(bench.config(&built).0.layers.len(), 1);
}

/// The names in the only layer of an image, sorted.
fn names_in(bench: &Bench, output: &BuildOutput) -> Vec<String> {
    let digest = bench.config(output).0.layers[0].digest;
    let blob = std::fs::File::open(bench.root.path().join("store/blobs/sha256").join(digest.hex())).unwrap();
    let mut archive = tar::Archive::new(flate2::read::MultiGzDecoder::new(blob));
    let mut names: Vec<String> = archive.entries().unwrap().map(|e| e.unwrap().path().unwrap().display().to_string()).collect();
    names.sort();
    names
}

#[test]
fn the_state_folder_is_part_of_no_context() {
    let mut bench = Bench::new(&[("x", "1"), ("d/y", "2")]);
    bench.root = tempfile::tempdir_in(bench.context.path().join("d")).unwrap();
    let inside = bench.root.path().file_name().unwrap().to_str().unwrap().to_owned();
    let built = bench.build("FROM scratch\nCOPY . /\n").unwrap();
    assert_eq!(names_in(&bench, &built), ["d/", "d/y", "x"]);
    let error = bench.build(&format!("FROM scratch\nCOPY d/{inside}/version /\n")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Source, "{error}");
    bench.context = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(bench.root.path(), bench.context.path().join("c")).unwrap();
    let context = LocalContext::new(bench.context.path().join("c"), Patterns::default());
    let input = BuildInput {
        dockerfile: "FROM scratch\nCOPY . /\n".into(),
        contexts: BTreeMap::from([("context".into(), context)]),
        options: vec![bench.options.clone()],
        ..BuildInput::default()
    };
    let error = bench.engine().build(&input, &(bench.events.clone() as Arc<dyn EventSink>), &Cancel::default()).unwrap_err();
    assert!(error.kind() == ErrorKind::Usage && error.to_string().contains("--root"), "{error}");
}

/// Folders `d` in one another, made without a path that is too long.
fn make_deep(dir: &Path, depth: usize, file_at: usize) {
    use rustix::fs::{Mode, OFlags};
    let open =
        |at: &std::os::fd::OwnedFd, name: &str| rustix::fs::openat(at, name, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let mut at = rustix::fs::open(dir, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap();
    for level in 0..depth {
        if level == file_at {
            rustix::fs::openat(&at, "f", OFlags::CREATE | OFlags::WRONLY, Mode::from_raw_mode(0o644)).unwrap();
        }
        rustix::fs::mkdirat(&at, "d", Mode::from_raw_mode(0o755)).unwrap();
        at = open(&at, "d");
    }
}

fn remove_deep(dir: &Path) {
    use std::os::fd::AsFd;
    let parent = std::fs::File::open(dir).unwrap();
    ovenbird_oci::layer::remove(parent.as_fd(), c"d").unwrap();
}

#[test]
fn deep_folders_are_copied_or_refused() {
    let bench = Bench::new(&[]);
    make_deep(bench.context.path(), 1200, 1100);
    let built = bench.build("FROM scratch AS a\nCOPY . /\nFROM scratch\nCOPY --from=a . /\n").unwrap();
    assert_eq!(names_in(&bench, &built).len(), 1201);
    remove_deep(bench.context.path());
    make_deep(bench.context.path(), 5000, 4999);
    for dockerfile in ["FROM scratch\nCOPY . /\n", "FROM scratch\nCOPY d /x/\n", "FROM scratch\nCOPY d*/d /x/\n"] {
        let error = bench.build(dockerfile).unwrap_err();
        let text = error.to_string();
        assert!(error.kind() == ErrorKind::Source && text.contains("4,096") && text.len() < 400, "{dockerfile} {text}");
    }
    remove_deep(bench.context.path());
    let long = "d/".repeat(5000);
    for dockerfile in [format!("FROM scratch\nWORKDIR /{long}\n"), format!("FROM scratch\nCOPY {long}x /\n")] {
        let error = bench.build(&dockerfile).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Source, "{:.300}", error.to_string());
    }
    let left = std::fs::read_dir(bench.root.path().join("recorded/tmp")).unwrap().flatten().filter(|e| e.path().is_dir());
    assert_eq!(left.count(), 0);
}

#[test]
fn a_long_chain_of_copies_needs_no_descriptor_for_each_layer() {
    let bench = Bench::new(&[("x", "1"), ("d/y", "2")]);
    let mut dockerfile = String::from("FROM scratch\n");
    for n in 0..260 {
        writeln!(dockerfile, "COPY x /app/f{n}").unwrap();
    }
    dockerfile += "COPY d /app/\n";
    let limits = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let low = rustix::process::Rlimit { current: Some(200), ..limits };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, low).unwrap();
    let built = bench.build(&dockerfile);
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limits).unwrap();
    assert_eq!(built.unwrap().ran, 261);
}

#[test]
fn what_cannot_be_read_or_packed_is_a_matter_of_the_source() {
    let bench = Bench::new(&[("x", "1"), (".wh.y", "2"), ("d/.wh.z/f", "3")]);
    for dockerfile in
        ["FROM scratch\nCOPY . /\n", "FROM scratch\nCOPY x /.wh.x\n", "FROM scratch\nCOPY d /d\n", "FROM scratch\nWORKDIR /.wh.w\n"]
    {
        let error = bench.build(dockerfile).unwrap_err();
        assert!(error.kind() == ErrorKind::Source && error.to_string().contains("removed files"), "{dockerfile} {error}");
    }
    let error = ovenbird_engine::BuildError::File {
        step: "COPY".into(),
        line: None,
        source: ovenbird_engine::ops::file::FileError::Io {
            action: "write",
            path: "x".into(),
            source: std::io::Error::from_raw_os_error(28),
        },
    };
    assert_eq!(error.kind(), ErrorKind::Configuration, "a full disk");
}

#[test]
fn a_folder_gets_real_devices_or_a_warning() {
    use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
    let bench = Bench::new(&[]);
    let mut archive = tar::Builder::new(vec![]);
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::Char);
    header.set_mode(0o640);
    header.set_uid(7);
    header.set_gid(8);
    header.set_size(0);
    header.set_device_major(1).unwrap();
    header.set_device_minor(3).unwrap();
    archive.append_data(&mut header, "d/null", std::io::empty()).unwrap();
    std::fs::write(bench.context.path().join("a.tar"), archive.into_inner().unwrap()).unwrap();
    let built = bench.build("FROM scratch\nADD a.tar /\n").unwrap();
    let out = tempfile::tempdir().unwrap();
    let form = ovenbird_engine::Export::RootfsDir(out.path().into());
    let sink = bench.events.clone() as Arc<dyn EventSink>;
    bench.engine().export(&built.target, &form, &[], None, &sink, &Cancel::default()).unwrap();
    let warned = bench.events.0.lock().unwrap().iter().any(|e| matches!(e, Event::Warning { message, .. } if message.contains("/d/null")));
    match out.path().join("d/null").symlink_metadata() {
        Ok(meta) => {
            assert!(!warned && meta.file_type().is_char_device() && meta.rdev() == rustix::fs::makedev(1, 3));
            assert_eq!((meta.permissions().mode() & 0o7777, meta.uid()), (0o640, rustix::process::geteuid().as_raw()));
        }
        Err(_) => assert!(warned),
    }
}

/// As large as a copy must be to be packed from where its files are; most of it a hole, so that it costs little.
fn large_file(path: &Path) {
    use std::os::unix::fs::FileExt as _;
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let file = std::fs::File::create(path).unwrap();
    file.set_len(65 << 20).unwrap();
    for at in [0, 33 << 20, (65 << 20) - 7] {
        file.write_all_at(b"content", at).unwrap();
    }
}

const LARGE: &str = "FROM scratch\nCOPY --chown=5:6 --chmod=640 data /data/\n";

#[test]
fn a_large_copy_that_nothing_reads_is_packed_at_once_and_no_different() {
    let bench = Bench::new(&[("data/small", "small")]);
    large_file(&bench.context.path().join("data/large"));
    std::fs::hard_link(bench.context.path().join("data/large"), bench.context.path().join("data/link")).unwrap();
    let snapshots = || std::fs::read_dir(bench.root.path().join("recorded/snapshots")).unwrap().count();
    let first = bench.build(LARGE).unwrap();
    assert_eq!((first.ran, snapshots()), (1, 0), "no folder was filled");
    let second = bench.build(LARGE).unwrap();
    assert_eq!((second.ran, second.target.digest), (0, first.target.digest));
    let (manifest, config) = bench.config(&first);

    // Something reads it: it is unpacked, and is what it was.
    let read = bench.build(&format!("{LARGE}COPY data/small /data/later\n")).unwrap();
    assert_eq!((read.ran, read.cached, snapshots()), (1, 1, 2));
    assert_eq!(bench.config(&read).0.layers[0], manifest.layers[0]);

    // The same layer comes of a copy into a folder.
    let copied = Bench { root: tempfile::tempdir().unwrap(), ..bench };
    let output = copied.build(&format!("{LARGE}COPY data/small /data/later\n")).unwrap();
    let (other, other_config) = copied.config(&output);
    assert_eq!((&other.layers[0], other_config.rootfs.diff_ids[0]), (&manifest.layers[0], config.rootfs.diff_ids[0]));
}

#[test]
fn a_large_copy_whose_blob_is_damaged_is_made_again() {
    let bench = Bench::new(&[]);
    large_file(&bench.context.path().join("data/large"));
    let first = bench.build(LARGE).unwrap();
    let layer = bench.config(&first).0.layers[0].clone();
    let blob = bench.engine().store().blob_path(&layer.digest);
    let good = std::fs::read(&blob).unwrap();
    let replace = |bytes: &[u8]| {
        let new = blob.with_extension("new");
        std::fs::write(&new, bytes).unwrap();
        std::fs::rename(new, &blob).unwrap();
    };
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 1;
    for bad in [flipped, good[..good.len() / 2].to_vec(), vec![]] {
        replace(&bad);
        let read = bench.build(&format!("{LARGE}COPY data /again\n")).unwrap();
        assert_eq!(bench.config(&read).0.layers[0], layer);
        let files = bench.engine().store().verify(&layer.digest);
        assert!(files.is_ok(), "{files:?}");
        std::fs::remove_dir_all(bench.root.path().join("recorded")).unwrap();
        bench.build(LARGE).unwrap();
    }
}

#[test]
fn a_large_file_that_grows_while_it_is_copied_is_copied() {
    let bench = Bench::new(&[]);
    let path = bench.context.path().join("data/large");
    large_file(&path);
    let grows = path.clone();
    *bench.events.1.lock().unwrap() = Some(Box::new(move || {
        use std::io::Write as _;
        let mut file = std::fs::File::options().append(true).open(&grows).unwrap();
        file.write_all(b"more").unwrap();
    }));
    let first = bench.build(LARGE).unwrap();
    assert!(bench.events.0.lock().unwrap().iter().any(|e| matches!(e, Event::Warning { code, .. } if code == "context-changed")));
    let second = bench.build(LARGE).unwrap();
    assert_eq!((first.ran, second.ran), (1, 1), "the first was not kept");
}

#[test]
fn a_secret_in_a_large_copy_is_found() {
    let bench = Bench::new(&[("data/kept", "correct-horse-battery")]);
    large_file(&bench.context.path().join("data/large"));
    let secret = ovenbird_engine::input::SecretSource::Value(ovenbird_engine::input::Secret(b"correct-horse-battery".to_vec()));
    let context = LocalContext::new(bench.context.path(), Patterns::default());
    let input = BuildInput {
        dockerfile: LARGE.into(),
        contexts: BTreeMap::from([("context".into(), context)]),
        options: vec![bench.options.clone()],
        secrets: [("token".to_owned(), secret)].into(),
        ..BuildInput::default()
    };
    let engine = bench.engine();
    let build = || engine.build(&input, &(bench.events.clone() as Arc<dyn EventSink>), &Cancel::default());
    for _ in 0..2 {
        assert!(matches!(build(), Err(BuildError::Leak { .. })));
    }
    // One that was made when the secret was not known.
    bench.build_with(&engine, LARGE).unwrap();
    assert!(matches!(build(), Err(BuildError::Leak { .. })));
}
