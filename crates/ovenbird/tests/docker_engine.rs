//! The calls to a Docker Engine, over a real one.

mod engine_room;

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use engine_room::{Room, room, settings};
use ovenbird::docker_engine::{BuildCall, BuildFailure, ContainerSpec, DockerEngine, DockerEngineError, DockerSettings, Endpoint, Stream};
use ovenbird_engine::Cancel;
use ovenbird_testing::dockerd::Dockerd;
use ovenbird_testing::needs::{self, Need};
use ovenbird_testing::process;

fn shell(script: &str) -> ContainerSpec {
    ContainerSpec {
        image: "busybox".into(),
        command: ["sh", "-c", script].map(Into::into).into(),
        network: Some("none".into()),
        ..ContainerSpec::default()
    }
}

/// Runs it; what it said on both streams, and its code.
fn run(engine: &DockerEngine, spec: &ContainerSpec, input: &[u8]) -> (String, String, i64) {
    let id = engine.create_container(spec).unwrap();
    let mut attached = engine.attach_container(&id, spec.stdin).unwrap();
    engine.start_container(&id).unwrap();
    attached.input.write_all(input).unwrap();
    drop(attached.input);
    let (mut out, mut err) = (vec![], vec![]);
    for piece in attached.output {
        let (stream, bytes) = piece.unwrap();
        if stream == Stream::Stdout { &mut out } else { &mut err }.extend_from_slice(&bytes);
    }
    let code = engine.wait_container(&id, &Cancel::default()).unwrap();
    engine.remove_container(&id).unwrap();
    (String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap(), code)
}

#[test]
fn containers_and_images() {
    let Some(Room { engine, .. }) = &room("docker_engine::containers_and_images") else { return };
    assert!(engine.reach().unwrap().api >= (1, 40));
    let cancel = Cancel::default();

    // Both streams, the exit code, and standard input to its end.
    assert_eq!(run(engine, &shell("echo a; echo b >&2; exit 7"), b""), ("a\n".into(), "b\n".into(), 7));
    let long = "x".repeat(300_000);
    let (echoed, _, code) = run(engine, &ContainerSpec { stdin: true, ..shell("cat; echo end") }, long.as_bytes());
    assert_eq!((echoed.len(), echoed.ends_with("xend\n"), code), (300_004, true, 0));

    // What is asked for is there.
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("f"), "bound").unwrap();
    let spec = ContainerSpec {
        entrypoint: Some(vec!["/bin/sh".into(), "-c".into()]),
        command: vec!["id -u; pwd; echo $A; cat /b/f; echo no > /b/f || mount | grep -c ' on /t '; grep CapEff /proc/self/status".into()],
        env: vec!["A=1 2".into()],
        binds: vec![format!("{}:/b:ro", dir.path().display())],
        tmpfs: [("/t".to_owned(), "size=1m".to_owned())].into(),
        user: Some("1000".into()),
        working_directory: Some("/tmp".into()),
        ..shell("")
    };
    let (said, _, _) = run(engine, &spec, b"");
    assert_eq!(said, "1000\n/tmp\n1 2\nbound1\nCapEff:\t0000000000000000\n");

    // Files put into a container that does not run; its logs; found by its label.
    let label = format!("org.ovenbird.test={}", std::process::id());
    let (name, value) = label.split_once('=').unwrap();
    let spec = ContainerSpec {
        labels: [(name.to_owned(), value.to_owned())].into(),
        name: Some("with-files".into()),
        ..shell("cat /put/here; echo; sleep 60")
    };
    let id = engine.create_container(&spec).unwrap();
    engine
        .put_archive(&id, "/", &cancel, |out| {
            let mut tar = tar::Builder::new(out);
            let mut header = tar::Header::new_gnu();
            header.set_size(4);
            header.set_mode(0o644);
            tar.append_data(&mut header, "put/here", &b"file"[..])?;
            tar.finish()
        })
        .unwrap();
    engine.start_container(&id).unwrap();
    let said = engine.container_logs(&id, true).unwrap().next().unwrap().unwrap();
    assert_eq!((said.0, &said.1[..]), (Stream::Stdout, &b"file\n"[..]));
    let found = engine.containers_with_label(&label).unwrap();
    assert_eq!((found.len(), &found[0].id, found[0].running, found[0].names.as_slice()), (1, &id, true, &["with-files".to_owned()][..]));
    assert_eq!(engine.inspect_container(&id).unwrap()["State"]["Running"], true);

    // A wait that is cancelled ends at once, and the container goes on.
    let stop = Cancel::default();
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(100));
            stop.cancel();
        });
        assert!(matches!(engine.wait_container(&id, &stop), Err(DockerEngineError::Cancelled { .. })));
    });
    assert!(start.elapsed() < Duration::from_secs(5));
    engine.stop_container(&id, Duration::ZERO).unwrap();
    assert_eq!(engine.wait_container(&id, &cancel), Ok(137));
    engine.remove_container(&id).unwrap();
    engine.remove_container(&id).unwrap();
    assert_eq!(engine.containers_with_label(&label), Ok(vec![]));

    // Images: named, saved, removed; names with a path, a port and a digest are one thing each.
    let id = engine.image_id("busybox").unwrap();
    for name in ["ns/img:1", "localhost:5000/a/b:2", "other"] {
        let reference: ovenbird_oci::Reference = name.parse().unwrap();
        engine.tag(&id.to_string(), &reference).unwrap();
        assert!(engine.image_exists(name).unwrap(), "{name}");
        assert_eq!(engine.images(name).unwrap().len(), 1, "{name}");
    }
    assert!(!engine.image_exists("ns/img:2").unwrap());
    let size = engine.save("ns/img:1", &cancel, |archive| {
        let mut bytes = vec![];
        archive.read_to_end(&mut bytes).map(|_| bytes.len())
    });
    assert!(size.unwrap().unwrap() > 100_000);
    assert!(engine.save("none:1", &cancel, |archive| archive.read_to_end(&mut vec![]).is_err()).is_err());
    engine.remove_image("ns/img:1", false).unwrap();
    assert!(!engine.image_exists("ns/img:1").unwrap() && engine.image_exists("other").unwrap());
    assert!(engine.remove_image("ns/img:1", false).is_err_and(|error| error.is_not_found()));

    // What it refuses, in its words.
    let error = engine.create_container(&ContainerSpec { image: "none:1".into(), ..ContainerSpec::default() }).unwrap_err();
    assert!(error.is_not_found() && error.to_string().starts_with("the Docker Engine refused container creation: "), "{error}");
    let error = engine.load(&cancel, |out| out.write_all(b"not an archive")).unwrap_err();
    assert!(matches!(error, DockerEngineError::Refused { .. }), "{error:?}");
    let error = engine.load(&cancel, |_| Err(std::io::Error::other("disk is gone"))).unwrap_err();
    assert_eq!(error.to_string(), "what load sends to the Docker Engine cannot be made: disk is gone");
}

/// A certificate authority, a server's certificate for 127.0.0.1, and a client's.
fn certificates(dir: &Path) {
    let script = "umask 077
        authority() { openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=$1 -keyout $1-key.pem -out $1.pem; }
        sign() {
            openssl req -newkey rsa:2048 -nodes -subj /CN=$1 -keyout $1-key.pem -out $1.csr
            printf \"$2\" > $1.ext
            openssl x509 -req -in $1.csr -CA ca.pem -CAkey ca-key.pem -CAcreateserial -days 2 -extfile $1.ext -out $1-cert.pem
        }
        authority ca; authority other
        sign server 'subjectAltName=IP:127.0.0.1\\nextendedKeyUsage=serverAuth'; sign client 'extendedKeyUsage=clientAuth'
        cp client-cert.pem cert.pem; cp client-key.pem key.pem";
    process::output(Command::new("sh").args(["-ec", script]).current_dir(dir)).unwrap();
}

#[test]
fn an_engine_behind_tls() {
    let test = "docker_engine::an_engine_behind_tls";
    if !needs::available(test, &[Need::Docker, Need::Registry]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let _dockerd = match Dockerd::start_with_tls(&address, dir.path()) {
        Ok(dockerd) => dockerd,
        Err(error) => return needs::skip(test, &error.to_string()),
    };
    let host = format!("tcp://{address}");
    let with = |certificates: &Path| DockerSettings { tls_verify: true, certificates: Some(certificates.into()), ..settings(&host) };
    let engine = DockerEngine::new(&with(dir.path())).unwrap();
    assert!(engine.reach().unwrap().api >= (1, 40));
    assert!(!engine.image_exists("none").unwrap());

    // The same from a context.
    let config = dir.path().join("config");
    let key = ovenbird_oci::Digest::of(b"far").hex();
    let (meta, material) = (config.join("contexts/meta").join(&key), config.join("contexts/tls").join(&key).join("docker"));
    for folder in [&meta, &material] {
        std::fs::create_dir_all(folder).unwrap();
    }
    std::fs::write(meta.join("meta.json"), format!("{{\"Name\":\"far\",\"Endpoints\":{{\"docker\":{{\"Host\":\"{host}\"}}}}}}")).unwrap();
    for file in ["ca.pem", "cert.pem", "key.pem"] {
        std::fs::copy(dir.path().join(file), material.join(file)).unwrap();
    }
    let context = DockerSettings { context: Some("far".into()), config: Some(config), ..DockerSettings::default() };
    assert!(DockerEngine::new(&context).unwrap().reach().is_ok());

    // Nobody without a certificate gets in; an engine of another authority is not believed; a file that is missing is named.
    assert!(DockerEngine::new(&settings(&host)).unwrap().reach().is_err());
    let other = tempfile::tempdir().unwrap();
    std::fs::copy(dir.path().join("other.pem"), other.path().join("ca.pem")).unwrap();
    for file in ["cert.pem", "key.pem"] {
        std::fs::copy(dir.path().join(file), other.path().join(file)).unwrap();
    }
    let error = DockerEngine::new(&with(other.path())).unwrap().reach().unwrap_err();
    assert!(matches!(error, DockerEngineError::Unreachable { .. }) && error.to_string().contains("certificate"), "{error}");
    std::fs::remove_file(other.path().join("key.pem")).unwrap();
    let error = DockerEngine::new(&with(other.path())).unwrap().reach().unwrap_err();
    assert!(matches!(&error, DockerEngineError::Configuration { what, .. } if what.ends_with("key.pem")), "{error}");
}

#[test]
fn an_engine_that_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("none.sock");
    let engine = DockerEngine::new(&settings(&format!("unix://{}", socket.display()))).unwrap();
    assert_eq!(engine.endpoint(), &Endpoint::Unix(socket.clone()));
    let error = engine.reach().unwrap_err();
    assert!(matches!(&error, DockerEngineError::Unreachable { forbidden: false, .. }), "{error}");

    // Something listens that never answers.
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let start = Instant::now();
    assert!(matches!(engine.reach(), Err(DockerEngineError::Broken { .. })));
    assert!(start.elapsed() < Duration::from_secs(8));

    // Nobody on the port; something that speaks no HTTP.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let talk = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut asked = [0; 16];
        let _ = stream.read(&mut asked);
        let _ = stream.write_all(b"220 smtp ready\r\n");
    });
    let error = DockerEngine::new(&settings(&format!("tcp://{address}"))).unwrap().reach().unwrap_err();
    assert!(matches!(error, DockerEngineError::Broken { .. }), "{error:?}");
    talk.join().unwrap();
    let error = DockerEngine::new(&settings(&format!("tcp://{address}"))).unwrap().reach().unwrap_err();
    assert!(matches!(error, DockerEngineError::Unreachable { .. }), "{error:?}");
}

/// Something at a socket that answers every request with this beginning, and then for ever with this.
fn liar(begin: &'static [u8], more: impl Into<Vec<u8>>) -> (tempfile::TempDir, DockerEngine) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("liar.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let more = more.into();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, more) = (stream.unwrap(), more.clone());
            std::thread::spawn(move || {
                let mut asked = [0; 4096];
                let _ = stream.read(&mut asked);
                if stream.write_all(begin).is_ok() {
                    while !more.is_empty() && stream.write_all(&more).is_ok() {}
                }
                // Silence until the other end gives up.
                while stream.read(&mut asked).is_ok_and(|read| read > 0) {}
            });
        }
    });
    let engine = DockerEngine::new(&settings(&format!("unix://{}", socket.display()))).unwrap();
    (dir, engine)
}

/// Cancels after a while, and says how long the call went on.
fn cancelled<T>(call: impl FnOnce(&Cancel) -> T) -> (T, Duration) {
    let cancel = Cancel::default();
    let later = cancel.clone();
    let stopper = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(500));
        later.cancel();
        Instant::now()
    });
    let result = call(&cancel);
    let end = Instant::now();
    (result, end.saturating_duration_since(stopper.join().unwrap()))
}

const CHUNKS: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nb\r\n{\"stream\":\"\r\n";
const CHUNK: &[u8] = b"20\r\naaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n";

#[test]
fn an_engine_that_does_not_answer_is_given_up() {
    let (_dir, engine) = liar(b"", []);
    let (told, took) = cancelled(|cancel| engine.until(cancel).image_exists("x"));
    assert!(matches!(told, Err(DockerEngineError::Cancelled { .. })), "{told:?}");
    assert!(took < Duration::from_secs(2), "{took:?}");
    let start = Instant::now();
    let told = engine.within(Duration::from_secs(1)).remove_container("x");
    assert!(matches!(told, Err(DockerEngineError::Broken { .. })), "{told:?}");
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn an_answer_without_end_is_cut() {
    let (_dir, engine) = liar(CHUNKS, CHUNK);
    let told = engine.reach().unwrap_err().to_string();
    assert!(told.ends_with("it says more than 1 MiB at once"), "{told}");
}

#[test]
fn a_build_whose_words_have_no_end_can_be_cancelled() {
    let build = |engine: &DockerEngine, cancel: &Cancel| {
        engine.build(&BuildCall::default(), cancel, &ovenbird_engine::event::Silent, |out| out.write_all(&[0; 1024])).unwrap_err()
    };
    let (_dir, engine) = liar(CHUNKS, CHUNK);
    let (told, took) = cancelled(|cancel| build(&engine, cancel));
    assert!(matches!(told, BuildFailure::Engine(DockerEngineError::Cancelled { .. })), "{told}");
    assert!(took < Duration::from_secs(3), "{took:?}");

    // Without a cancel the limit ends it.
    let large = [b"80000\r\n".as_slice(), &vec![b'a'; 0x80000], b"\r\n"].concat();
    let (_dir, engine) = liar(CHUNKS, large);
    let told = build(&engine, &Cancel::default());
    assert!(told.to_string().ends_with("it says more than 8 MiB at once"), "{told}");

    // Not even its headers end.
    let (_dir, engine) = liar(b"HTTP/1.1 200 OK\r\nX-Long: ", CHUNK);
    assert!(matches!(engine.reach(), Err(DockerEngineError::Broken { .. })));
}
