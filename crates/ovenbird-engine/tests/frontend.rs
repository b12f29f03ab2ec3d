//! Dockerfile text in, plan out: each row is a Dockerfile, options, and what must be true of the result.

use ovenbird_dockerfile::{Severity, parse};
use ovenbird_engine::frontend::{Images, Lowered, NamedContext, NoCache, Options, lower};
use ovenbird_engine::plan::{ImageRequest, NetworkMode, Op, Plan, ResolvedImage};
use ovenbird_oci::{Digest, Platform};
use serde_json::{Value, json};

/// Images that exist: name, config.
fn fixture(name: &str, platform: &Platform) -> Option<Value> {
    let short = name.strip_prefix("docker.io/library/").unwrap_or(name);
    let config = match short.split('@').next().unwrap_or_default().trim_end_matches(":latest") {
        "debian" | "debian:12" => json!({"Env": ["PATH=/bin"], "Cmd": ["bash"]}),
        "bare" => json!({}),
        "app" => json!({
            "Env": ["PATH=/bin", "A=base", "EMPTY"], "Cmd": ["serve"], "Entrypoint": ["/entry"], "WorkingDir": "/app", "User": "web",
            "Labels": {"a": "1", "b": "2"}, "ExposedPorts": {"80/tcp": {}}, "Volumes": {"/data": {}}, "StopSignal": "SIGINT",
            "Shell": ["/bin/bash", "-ec"], "Healthcheck": {"Test": ["CMD", "x"], "Interval": 5}, "Hostname": "gone", "StopTimeout": 3,
        }),
        "trigger" => json!({"Env": ["PATH=/bin"], "OnBuild": ["RUN echo hi", "COPY --from=tool /t /t", "ENV T=1"]}),
        "badtrigger" => json!({"OnBuild": ["NONSENSE x"]}),
        "tool" | "amd64only" | "empty" => json!({"Env": ["PATH=/bin"]}),
        _ => return None,
    };
    let layers = if short == "empty" { vec![] } else { vec![Digest::of(b"layer").to_string()] };
    let architecture = if short == "amd64only" { "amd64" } else { &platform.architecture };
    let history = if short == "empty" { json!([]) } else { json!([{"created_by": "base"}]) };
    Some(json!({
        "created": "2020-01-01T00:00:00Z", "author": "someone", "architecture": architecture, "os": "linux", "docker_version": "1",
        "config": config, "rootfs": {"type": "layers", "diff_ids": layers}, "history": history,
    }))
}

fn resolve(request: &ImageRequest) -> Option<ResolvedImage> {
    let config = fixture(&request.name, &request.platform)?;
    let manifest = Digest::of(format!("{} {}", request.name, request.platform).as_bytes());
    Some(ResolvedImage { reference: request.name.parse().ok()?, manifest, config: serde_json::from_value(config).ok()? })
}

/// `arg A=b; target x; label k=v; context n=SPEC; allow e; platform p; multi; no-cache [stage]; network m; hostname h; host n=ip`.
fn options(text: &str) -> Options {
    let mut options =
        Options { platform: "linux/amd64".parse().unwrap(), build_platform: "linux/amd64".parse().unwrap(), ..Options::default() };
    for part in text.split(';').map(str::trim).filter(|part| !part.is_empty()) {
        let (key, value) = part.split_once(' ').unwrap_or((part, ""));
        let pair = || value.split_once('=').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
        match key {
            "arg" => drop(options.build_args.insert(pair().0, pair().1)),
            "label" => drop(options.labels.insert(pair().0, pair().1)),
            "target" => options.target = Some(value.into()),
            "platform" => options.platform = value.parse().unwrap(),
            "multi" => options.multi_platform = true,
            "no-cache" if value.is_empty() => options.no_cache = NoCache::All,
            "no-cache" => options.no_cache = NoCache::Stages(vec![value.into()]),
            "network" => options.network = if value == "host" { NetworkMode::Host } else { NetworkMode::None },
            "hostname" => options.hostname = Some(value.into()),
            "host" => options.add_hosts.push((pair().0, pair().1.parse().unwrap())),
            "allow" => options.entitlements.push(value.into()),
            "context" => {
                let (name, spec) = pair();
                let context = match spec.split_once(':') {
                    None => NamedContext::Local,
                    Some(("target", stage)) => NamedContext::Target(stage.into()),
                    Some(_) => NamedContext::Image(spec),
                };
                options.contexts.insert(name, context);
            }
            other => panic!("unknown option {other}"),
        }
    }
    options
}

/// What came out, as text: facts that rows can name.
struct Seen {
    needs: Vec<String>,
    rounds: usize,
    errors: Vec<String>,
    warnings: Vec<String>,
    plan: Option<Box<Plan>>,
}

fn see(dockerfile: &str, options_text: &str) -> Seen {
    let options = options(options_text);
    let parsed = parse(dockerfile);
    let mut seen = Seen { needs: vec![], rounds: 0, errors: vec![], warnings: vec![], plan: None };
    let full = |d: &ovenbird_dockerfile::Diagnostic| match &d.help {
        Some(help) => format!("{}: {} ({help})", d.code, d.message),
        None => format!("{}: {}", d.code, d.message),
    };
    // What the parser refuses never gets here in a build.
    seen.errors = parsed.diagnostics.iter().filter(|d| d.severity == Severity::Error).map(full).collect();
    if !seen.errors.is_empty() {
        return seen;
    }
    let mut images = Images::new();
    loop {
        match lower(&parsed.dockerfile, dockerfile, &options, &images) {
            Ok(Lowered::Needs(needs)) => {
                seen.rounds += 1;
                assert!(!needs.is_empty() && needs.iter().all(|need| !images.contains_key(need)), "{dockerfile}: {needs:?}");
                seen.needs = needs.iter().map(|need| need.name.clone()).collect();
                for need in needs {
                    let Some(image) = resolve(&need) else { return seen };
                    images.insert(need, image);
                }
            }
            Ok(Lowered::Done(plan, warnings)) => {
                check_invariants(dockerfile, &plan);
                seen.warnings = warnings.iter().map(full).collect();
                seen.plan = Some(plan);
                return seen;
            }
            Err(diagnostics) => {
                let last = diagnostics.last().unwrap();
                assert_eq!(last.severity, Severity::Error);
                seen.errors = diagnostics.iter().filter(|d| d.severity == Severity::Error).map(full).collect();
                seen.warnings = diagnostics.iter().filter(|d| d.severity == Severity::Warning).map(full).collect();
                return seen;
            }
        }
    }
}

/// True of every plan.
fn check_invariants(dockerfile: &str, plan: &Plan) {
    for (id, vertex) in plan.vertices.iter().enumerate() {
        assert!(vertex.op.inputs().iter().all(|input| *input < id), "{dockerfile}: {vertex:?}");
    }
    let mut layers = 0;
    let mut at = plan.root;
    while let Some(id) = at {
        layers += usize::from(!matches!(plan.vertices[id].op, Op::Image(_)));
        at = plan.vertices[id].op.base();
    }
    assert_eq!(plan.history.iter().filter(|h| h.layer).count(), layers, "{dockerfile}: {:?}", plan.history);
    assert!(plan.config.created.is_none() && plan.config.history.is_empty() && plan.config.rootfs.diff_ids.is_empty());
}

/// One expectation: `error X`, `warning X`, `quiet`, `needs a b`, `rounds N`, `name X`, `vertices N`, `lines ID A B`,
/// `history X` (one line, `+` in front when it has a layer), `histories N`, `config /pointer JSON`, `op ID /pointer JSON`
/// (`ID` counts from 0, `-1` is the root), `proxy A B`, `no-cache ID…`.
fn failures(dockerfile: &str, options: &str, expectations: &[&str]) -> Vec<String> {
    let seen = see(dockerfile, options);
    let is_error = expectations.iter().any(|e| e.starts_with("error"));
    let is_need = expectations.iter().any(|e| e.starts_with("needs"));
    let mut failures = Vec::new();
    if !is_error && (!seen.errors.is_empty() || !is_need && seen.plan.is_none()) {
        failures.push("a plan");
    }
    failures.extend(expectations.iter().filter(|expectation| !holds(&seen, expectation)));
    let context = || {
        let plan = seen.plan.as_ref().map(|plan| {
            let vertices: Vec<_> =
                plan.vertices.iter().map(|v| format!("  {} {:?} {}", v.name, v.lines, serde_json::to_string(&v.op).unwrap())).collect();
            let history: Vec<_> = plan.history.iter().map(|h| format!("  {}{}", if h.layer { "+" } else { "" }, h.created_by)).collect();
            format!("{}\n{}\n{}", vertices.join("\n"), history.join("\n"), serde_json::to_string(&plan.config).unwrap())
        });
        format!(
            "{dockerfile}\n[{options}]\nerrors {:?} warnings {:?} needs {:?} rounds {}\n{}",
            seen.errors,
            seen.warnings,
            seen.needs,
            seen.rounds,
            plan.unwrap_or_default()
        )
    };
    failures.iter().map(|what| format!("expected {what}\n{}\n", context())).collect()
}

fn holds(seen: &Seen, expectation: &str) -> bool {
    let (kind, rest) = expectation.split_once(' ').unwrap_or((expectation, ""));
    match kind {
        "error" => return seen.errors.iter().any(|e| e.contains(rest)),
        "warning" => return seen.warnings.iter().any(|w| w.contains(rest)),
        "quiet" => return seen.warnings.is_empty(),
        "needs" => return seen.needs.join(" ") == rest,
        "rounds" => return seen.rounds.to_string() == rest,
        _ => {}
    }
    let Some(plan) = &seen.plan else { return false };
    let vertex = |id: &str| match id {
        "-1" => plan.root.map(|root| &plan.vertices[root]),
        id => plan.vertices.get(id.parse::<usize>().unwrap()),
    };
    let found = |value: &Value, rest: &str| {
        let (pointer, json) = rest.split_once(' ').unwrap();
        let want: Value = serde_json::from_str(json).unwrap_or_else(|e| panic!("{json}: {e}"));
        value.pointer(pointer).unwrap_or(&Value::Null) == &want
    };
    match kind {
        "name" => plan.vertices.iter().any(|v| v.name == rest),
        "vertices" => plan.vertices.len().to_string() == rest,
        "history" => {
            let (layer, line) = rest.strip_prefix('+').map_or((false, rest), |line| (true, line));
            plan.history.iter().any(|h| h.layer == layer && h.created_by == line)
        }
        "histories" => plan.history.len().to_string() == rest,
        "config" => found(&serde_json::to_value(&plan.config).unwrap(), rest),
        "op" => {
            let (id, rest) = rest.split_once(' ').unwrap();
            vertex(id).is_some_and(|v| found(&serde_json::to_value(&v.op).unwrap(), rest))
        }
        "inputs" => {
            let (id, inputs) = rest.split_once(' ').unwrap_or((rest, ""));
            vertex(id).is_some_and(|v| v.op.inputs().iter().map(ToString::to_string).collect::<Vec<_>>().join(" ") == inputs)
        }
        "lines" => {
            let words: Vec<&str> = rest.split(' ').collect();
            vertex(words[0]).is_some_and(|v| v.lines == Some((words[1].parse().unwrap(), words[2].parse().unwrap())))
        }
        "proxy" => plan.vertices.iter().any(|v| matches!(&v.op, Op::Exec(e) if e.proxy_env.join(" ") == rest)),
        "no-cache" => {
            let marked = plan.vertices.iter().enumerate().filter(|(_, v)| v.no_cache).map(|(id, _)| id.to_string());
            marked.collect::<Vec<_>>().join(" ") == rest
        }
        other => panic!("unknown expectation {other}"),
    }
}

fn table(rows: &[(&str, &str, &[&str])]) {
    let failures: Vec<String> =
        rows.iter().flat_map(|(dockerfile, options, expectations)| failures(dockerfile, options, expectations)).collect();
    assert!(failures.is_empty(), "{} expectations failed\n{}", failures.len(), failures.join("\n"));
}

const SCRATCH_ENV: &str = r#"config /config/Env ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]"#;

#[test]
fn bases_and_arguments_in_from() {
    table(&[
        (
            "FROM scratch",
            "",
            &["vertices 0", "histories 0", SCRATCH_ENV, r#"config /config/WorkingDir "/""#, r#"config /architecture "amd64""#, "quiet"],
        ),
        ("FROM scratch", "platform linux/arm/v7", &[r#"config /architecture "arm""#, r#"config /variant "v7""#]),
        (
            "FROM debian:12",
            "",
            &[
                "vertices 1",
                r#"config /config/Cmd ["bash"]"#,
                r#"config /author "someone""#,
                "config /created null",
                "config /docker_version null",
            ],
        ),
        ("FROM missing", "", &["needs missing"]),
        ("FROM missing AS a\nFROM debian", "", &["vertices 1", "rounds 1"]),
        (
            "FROM missing AS a\nFROM gone AS b\nFROM scratch\nCOPY --from=a / /\nCOPY --from=b / /\nCOPY --from=third / /",
            "",
            &["needs gone missing third"],
        ),
        ("FROM bare", "", &[SCRATCH_ENV]),
        ("FROM empty\nRUN x", "", &["vertices 1", "inputs 0"]),
        ("ARG V=12\nFROM debian:$V", "", &["vertices 1", "quiet"]),
        ("ARG V=12\nFROM debian:$V", "arg V=99", &["needs debian:99"]),
        (
            "ARG V\nFROM debian:$V",
            "arg V=12",
            &["warning InvalidDefaultArgInFrom: Default value for ARG debian:$V results in empty or invalid base image name"],
        ),
        ("ARG A=deb\nARG B=${A}ian\nFROM ${B}", "", &["vertices 1"]),
        ("FROM debian$X", "", &["warning UndefinedArgInFrom: FROM argument 'X' is not declared", "vertices 1"]),
        (
            "ARG MYARCH=amd64\nFROM --platform=linux/$MY_ARCH debian",
            "",
            &["error failed to parse platform linux/$MY_ARCH: \"\" is an invalid component of \"linux/\"", "error (did you mean MYARCH?)"],
        ),
        (
            "FROM --platform=$BULIDPLATFORM scratch",
            "",
            &["error empty platform value from expression $BULIDPLATFORM (did you mean BUILDPLATFORM?)"],
        ),
        ("FROM --platform=a/b/c/d scratch", "", &["error failed to parse platform a/b/c/d"]),
        ("ARG X\nFROM $X", "", &["error base name ($X) should not be blank"]),
        ("ARG X=${X:?custom}\nFROM scratch", "", &["error failed to process \"${X:?custom}\": X: custom"]),
        ("FROM Bad:Name:x", "", &["error failed to parse stage name \"Bad:Name:x\": invalid reference format"]),
        ("FROM Bad:Name:x AS a\nFROM scratch", "", &["error failed to parse stage name"]),
        (
            "FROM --platform=$BUILDPLATFORM debian\nARG TARGETARCH\nRUN x",
            "platform linux/arm64; multi",
            &[
                r#"op 1 /Exec/env ["PATH=/bin","TARGETARCH=arm64"]"#,
                r#"config /architecture "arm64""#,
                "name [linux/amd64->arm64 2/2] RUN x",
            ],
        ),
        ("FROM --platform=linux/arm64 debian", "", &[r#"config /architecture "arm64""#]),
        (
            "FROM amd64only",
            "platform linux/arm64",
            &[
                "warning InvalidBaseImagePlatform: Base image amd64only was pulled with platform \"linux/amd64\", expected \"linux/arm64\" for current build",
                r#"config /architecture "arm64""#,
            ],
        ),
        (
            "FROM scratch\nARG TARGETPLATFORM\nARG TARGETSTAGE BUILDOS\nLABEL a=$TARGETPLATFORM-$TARGETSTAGE-$BUILDOS",
            "",
            &[r#"config /config/Labels/a "linux/amd64-default-linux""#, "quiet"],
        ),
        ("FROM scratch AS x\nARG TARGETSTAGE\nLABEL a=$TARGETSTAGE", "", &[r#"config /config/Labels/a "x""#]),
        ("FROM scratch\nLABEL a=${TARGETOS:-none}", "", &[r#"config /config/Labels/a "none""#]),
        ("ARG SOURCE_DATE_EPOCH=soon\nFROM scratch", "", &["error invalid SOURCE_DATE_EPOCH: soon"]),
        ("FROM scratch", "arg SOURCE_DATE_EPOCH=12", &["quiet"]),
    ]);
}

#[test]
fn stages() {
    table(&[
        (
            "FROM scratch AS a\nCOPY x /x\nFROM a\nCOPY y /y",
            "",
            &["vertices 3", "histories 2", "name [a 1/1] COPY x /x", "name [stage-1 1/1] COPY y /y"],
        ),
        ("FROM scratch AS a\nCOPY x /x\nFROM A\nCOPY --from=A /x /y", "", &["inputs 2 1 1", "quiet"]),
        (
            "FROM scratch AS a\nCOPY x /x\nFROM scratch\nCOPY --from=0 /x /y",
            "",
            &["vertices 3", "inputs 2 1", "op 2 /File/actions/0/Copy/keep_owner true"],
        ),
        (
            "FROM scratch AS a\nCOPY x /x\nFROM scratch AS b\nCOPY y /y",
            "target a",
            &["vertices 2", "histories 1", "name [a 1/1] COPY x /x"],
        ),
        ("FROM scratch AS a\nCOPY x /x\nFROM scratch AS b", "target A", &["histories 1"]),
        ("FROM scratch\nCOPY x /x\nFROM scratch AS b", "target 0", &["histories 1"]),
        (
            "FROM scratch AS build\nFROM scratch AS final",
            "target biuld",
            &["error target stage \"biuld\" could not be found (did you mean build?)"],
        ),
        ("FROM scratch", "target 7", &["error target stage \"7\" could not be found"]),
        ("FROM scratch AS a\nCOPY --from=a x /x", "", &["error circular dependency detected on stage: a"]),
        (
            "FROM scratch AS a\nCOPY --from=b x /x\nFROM scratch AS b\nCOPY --from=a x /x",
            "",
            &["error circular dependency detected on stage: a"],
        ),
        (
            "FROM scratch AS a\nRUN --mount=from=b,target=/b x\nFROM scratch AS b\nCOPY --from=a x /x",
            "",
            &["error circular dependency detected on stage: a"],
        ),
        (
            "FROM scratch AS a\nCOPY --from=b x /x\nFROM scratch AS b",
            "target a",
            &["error cannot copy from stage \"b\", it needs to be defined before current stage \"a\""],
        ),
        (
            "FROM debian AS a\nRUN --mount=from=b,target=/b x\nFROM scratch AS b",
            "target a",
            &["error cannot mount from stage \"b\" to \"/b\""],
        ),
        ("FROM scratch\nCOPY --from=5 x /x", "", &["error invalid stage index 5"]),
        ("FROM scratch\nCOPY --from=-1 x /x", "", &["error invalid stage index -1"]),
        ("FROM scratch\nCOPY --from=scratch x /x", "", &["vertices 2", "op 0 /File/actions []"]),
        ("FROM scratch\nCOPY --from=debian /x /x", "", &["vertices 2", "inputs 1 0"]),
        (
            "FROM scratch\nCOPY --from=debian /x /x",
            "",
            &["name [stage-0 1/1] COPY --from=debian /x /x", "op 1 /File/actions/0/Copy/keep_owner true"],
        ),
        (
            "FROM debian AS a\nRUN one\nFROM debian AS b\nRUN two\nFROM scratch\nCOPY --from=a /a /a\nCOPY --from=b /b /b",
            "",
            &["vertices 5", "rounds 1"],
        ),
        (
            "FROM debian AS a\nRUN same\nFROM debian AS b\nRUN same\nFROM scratch\nCOPY --from=a /a /a\nCOPY --from=b /b /b",
            "",
            &["vertices 4"],
        ),
        (
            "FROM debian AS a\nRUN one\nRUN same\nFROM debian AS b\nRUN two\nRUN same\nFROM scratch\nCOPY --from=a /a /a\nCOPY --from=b /b /b",
            "",
            &["vertices 7"],
        ),
        ("FROM debian\nRUN x", "no-cache", &["no-cache 1"]),
        ("FROM debian AS a\nRUN x\nFROM a\nRUN y", "no-cache A", &["no-cache 1"]),
        ("# c\n\nFROM debian\nRUN a \\\n  b\nCOPY <<E /x\nhi\nE", "", &["lines 0 3 3", "lines 1 4 5", "lines 2 6 8"]),
        ("FROM debian\nRUN x", "multi", &["name [linux/amd64 2/2] RUN x"]),
    ]);
}

#[test]
fn arguments_and_environment() {
    table(&[
        (
            "FROM debian\nARG A=1\nRUN x",
            "",
            &[
                "history ARG A=1",
                "history +RUN |1 A=1 /bin/sh -c x # buildkit",
                r#"op 1 /Exec/env ["PATH=/bin","A=1"]"#,
                r#"config /config/Env ["PATH=/bin"]"#,
            ],
        ),
        ("FROM debian\nARG A=1\nRUN x", "arg A=2", &["history ARG A=2", "history +RUN |1 A=2 /bin/sh -c x # buildkit"]),
        (
            "FROM debian\nARG A\nRUN x",
            "",
            &["history ARG A", "history +RUN |1 A= /bin/sh -c x # buildkit", r#"op 1 /Exec/env ["PATH=/bin"]"#],
        ),
        ("FROM debian\nARG A B=2 A=3\nRUN x", "", &["history ARG A B=2 A=3", "history +RUN |2 A=3 B=2 /bin/sh -c x # buildkit"]),
        ("FROM debian\nARG A=1\nARG B=$A-2\nLABEL l=$B", "", &[r#"config /config/Labels/l "1-2""#]),
        ("ARG G=1\nFROM debian\nLABEL l=${G:-unset}", "", &[r#"config /config/Labels/l "unset""#]),
        ("ARG G=1\nFROM debian\nARG G\nLABEL l=$G", "", &[r#"config /config/Labels/l "1""#, "history ARG G=1"]),
        ("ARG G=1\nFROM debian\nARG G=2\nLABEL l=$G", "", &[r#"config /config/Labels/l "2""#]),
        ("ARG G=1\nFROM debian\nARG G=2\nLABEL l=$G", "arg G=3", &[r#"config /config/Labels/l "3""#]),
        ("FROM debian AS a\nARG A=1\nFROM a\nRUN echo $A", "", &["history +RUN |1 A=1 /bin/sh -c echo $A # buildkit"]),
        ("FROM debian AS a\nARG A=1\nFROM debian\nLABEL l=${A:-no}", "", &[r#"config /config/Labels/l "no""#]),
        (
            "FROM debian\nARG A=1\nENV A=2\nRUN x",
            "arg A=9",
            &["history +RUN |1 A=2 /bin/sh -c x # buildkit", r#"op 1 /Exec/env ["PATH=/bin","A=2"]"#],
        ),
        ("FROM app\nLABEL l=$A-$EMPTY", "", &[r#"config /config/Labels/l "base-""#, "quiet"]),
        ("FROM debian\nENV A=1\nENV A=2 B=$A", "", &[r#"config /config/Env ["PATH=/bin","A=2","B=1"]"#, "history ENV A=2 B=1"]),
        ("FROM debian\nENV PATH=$PATH:/x Z=1", "", &[r#"config /config/Env ["PATH=/bin:/x","Z=1"]"#]),
        ("FROM debian\nENV A hello  world", "", &[r#"config /config/Env/1 "A=hello  world""#, "history ENV A=hello  world"]),
        ("FROM debian\nENV A='$x' B=\\$y C=\"a b\"", "", &[r#"config /config/Env ["PATH=/bin","A=$x","B=$y","C=a b"]"#, "quiet"]),
        ("FROM app\nENV A=new", "", &[r#"config /config/Env ["PATH=/bin","A=new","EMPTY"]"#]),
        ("FROM debian\nENV K=x\nENV $K=1", "", &[r#"config /config/Env/2 "x=1""#]),
        ("FROM debian\nENV A=$PAHT", "", &["warning UndefinedVar: Usage of undefined variable '$PAHT' (did you mean $PATH?)"]),
        ("FROM debian\nARG A\nENV B=$A", "", &["quiet"]),
        ("FROM debian AS dead\nENV B=$NOPE\nFROM scratch", "", &["quiet"]),
        ("# check=skip=UndefinedVar\nFROM debian\nENV B=$NOPE", "", &["quiet"]),
        (
            "# check=error=true\nFROM debian\nENV B=$NOPE",
            "",
            &["error lint violation found for rules: UndefinedVar", "warning UndefinedVar"],
        ),
        ("# check=skip=all\nFROM debian\nENV B=$NOPE", "arg BUILDKIT_DOCKERFILE_CHECK=error=true", &["error lint violation found"]),
        ("# check=error=true\nFROM debian", "arg X=1", &["warning One or more build-args [X] were not consumed"]),
        (
            "FROM scratch",
            "arg X=1; arg Y=2; arg http_proxy=p; arg BUILDKIT_INLINE_CACHE=1; arg TARGETOS=linux",
            &["warning One or more build-args [X Y] were not consumed"],
        ),
        ("FROM scratch AS dead\nARG X\nFROM scratch", "arg X=1", &["quiet"]),
        (
            "FROM debian\nRUN x",
            "arg http_proxy=p",
            &["proxy HTTP_PROXY=p http_proxy=p", "history +RUN /bin/sh -c x # buildkit", r#"op 1 /Exec/env ["PATH=/bin"]"#],
        ),
        ("FROM debian\nARG http_proxy\nRUN x", "arg http_proxy=p", &["history +RUN |1 http_proxy=p /bin/sh -c x # buildkit"]),
        ("FROM debian\nARG BUILDKIT_SBOM_SCAN_STAGE=true\nRUN x", "", &[r#"op 1 /Exec/env ["PATH=/bin"]"#]),
        ("FROM scratch\nLABEL a=${B", "", &["error failed to process"]),
    ]);
}

#[test]
fn config_instructions() {
    table(&[
        (
            "FROM app",
            "",
            &[
                r#"config /config/Entrypoint ["/entry"]"#,
                r#"config /config/Cmd ["serve"]"#,
                "config /config/Hostname null",
                "config /config/StopTimeout 3",
                r#"config /config/User "web""#,
            ],
        ),
        (
            "FROM app\nENTRYPOINT [\"/other\"]",
            "",
            &[r#"config /config/Entrypoint ["/other"]"#, "config /config/Cmd null", r#"history ENTRYPOINT ["/other"]"#],
        ),
        ("FROM app\nCMD [\"a\"]\nENTRYPOINT [\"/other\"]", "", &[r#"config /config/Cmd ["a"]"#]),
        ("FROM app AS x\nCMD [\"a\"]\nFROM x\nENTRYPOINT [\"/other\"]", "", &["config /config/Cmd null"]),
        ("FROM app\nENTRYPOINT []", "", &["config /config/Entrypoint null", "history ENTRYPOINT []"]),
        (
            "FROM scratch\nCMD a \"b\"",
            "",
            &[
                r#"config /config/Cmd ["/bin/sh","-c","a \"b\""]"#,
                r#"history CMD ["/bin/sh" "-c" "a \"b\""]"#,
                "config /config/ArgsEscaped true",
            ],
        ),
        (
            "FROM scratch\nSHELL [\"bash\", \"-c\"]\nCMD a\nENTRYPOINT b",
            "",
            &[r#"config /config/Cmd ["bash","-c","a"]"#, r#"config /config/Entrypoint ["bash","-c","b"]"#, "history SHELL [bash -c]"],
        ),
        ("FROM app\nCMD a", "", &[r#"config /config/Cmd ["/bin/bash","-ec","a"]"#]),
        ("FROM scratch\nLABEL a=1 \"b c\"=\"d e\"", "", &[r#"config /config/Labels {"a":"1","b c":"d e"}"#, "history LABEL a=1 b c=d e"]),
        (
            "FROM app\nLABEL b=3 c=4",
            "label c=5; label d=6",
            &[r#"config /config/Labels {"a":"1","b":"3","c":"5","d":"6"}"#, "history LABEL b=3 c=4"],
        ),
        ("FROM scratch\nUSER a:b", "", &[r#"config /config/User "a:b""#, "history USER a:b"]),
        ("FROM scratch\nARG U=7\nUSER $U", "", &[r#"config /config/User "7""#, "history USER 7"]),
        (
            "FROM app\nVOLUME /a /b\nVOLUME [\"/c d\"]",
            "",
            &[r#"config /config/Volumes {"/data":{},"/a":{},"/b":{},"/c d":{}}"#, "history VOLUME [/a /b]", "history VOLUME [/c d]"],
        ),
        ("FROM scratch\nVOLUME [\"\"]", "", &["error VOLUME specified can not be an empty string"]),
        (
            "FROM app\nEXPOSE 8080-8082/TCP 53/udp",
            "",
            &[
                r#"config /config/ExposedPorts {"53/udp":{},"80/tcp":{},"8080/tcp":{},"8081/tcp":{},"8082/tcp":{}}"#,
                "history EXPOSE [53/udp 8080/tcp 8081/tcp 8082/tcp]",
            ],
        ),
        ("FROM scratch\nARG P=\"1 2\"\nEXPOSE $P", "", &["history EXPOSE [1/tcp 2/tcp]"]),
        ("FROM scratch\nEXPOSE 1/x", "", &["error invalid proto: x"]),
        ("FROM scratch\nARG S=TERM\nSTOPSIGNAL $S", "", &[r#"config /config/StopSignal "TERM""#, "history STOPSIGNAL TERM"]),
        ("FROM scratch\nSTOPSIGNAL NOPE", "", &["error invalid signal: NOPE"]),
        ("FROM scratch\nMAINTAINER me <me@x>", "", &[r#"config /author "me <me@x>""#, "history MAINTAINER me <me@x>"]),
        (
            "FROM scratch\nHEALTHCHECK --interval=1m30s --retries=2 CMD curl $X",
            "",
            &[
                r#"config /config/Healthcheck {"Test":["CMD-SHELL","curl $X"],"Interval":90000000000,"Retries":2}"#,
                r#"history HEALTHCHECK &{["CMD-SHELL" "curl $X"] "1m30s" "0s" "0s" "0s" '\x02'}"#,
                "quiet",
            ],
        ),
        ("FROM app\nHEALTHCHECK NONE", "", &[r#"config /config/Healthcheck {"Test":["NONE"]}"#]),
        ("FROM scratch\nHEALTHCHECK CMD [\"a\", \"b\"]", "", &[r#"config /config/Healthcheck {"Test":["CMD","a","b"]}"#]),
        (
            "FROM debian\nWORKDIR /a\nWORKDIR b/../c\nRUN x",
            "",
            &[
                r#"config /config/WorkingDir "/a/c""#,
                "history +WORKDIR /a/c",
                r#"op 2 /File/actions/0/Mkdir/path "/a/c""#,
                r#"op 3 /Exec/cwd "/a/c""#,
                "name [3/4] WORKDIR b/../c",
            ],
        ),
        ("FROM debian\nUSER u\nWORKDIR /a", "", &[r#"op 1 /File/actions/0/Mkdir/owner "u""#]),
        ("FROM debian\nWORKDIR /", "", &["vertices 1", "history WORKDIR /"]),
        ("FROM app\nWORKDIR sub", "", &[r#"config /config/WorkingDir "/app/sub""#, r#"op 1 /File/actions/0/Mkdir/owner "web""#]),
        ("FROM scratch\nENV D=/x\nWORKDIR $D/y", "", &["history +WORKDIR /x/y", "name [1/1] WORKDIR /x/y"]),
        (
            "FROM scratch\nONBUILD RUN echo $X\nONBUILD COPY . .",
            "",
            &[r#"config /config/OnBuild ["RUN echo $X","COPY . ."]"#, "histories 0"],
        ),
    ]);
}

#[test]
fn triggers() {
    table(&[
        (
            "FROM trigger",
            "",
            &[
                "rounds 2",
                "vertices 4",
                "config /config/OnBuild null",
                "history +RUN /bin/sh -c echo hi # buildkit",
                "history +COPY /t /t # buildkit",
                "history ENV T=1",
                "name [2/4] ONBUILD RUN echo hi",
                "lines 2 1 1",
            ],
        ),
        ("FROM trigger\nLABEL l=$T", "", &[r#"config /config/Labels/l "1""#]),
        ("FROM debian AS a\nONBUILD ENV A=1\nFROM a\nLABEL l=$A", "", &[r#"config /config/Labels/l "1""#, "config /config/OnBuild null"]),
        ("FROM debian AS a\nONBUILD ENV A=1\nFROM a AS b\nFROM b\nLABEL l=${A:-x}", "", &[r#"config /config/Labels/l "1""#, "histories 2"]),
        ("FROM trigger AS a\nFROM a", "", &["histories 3"]),
        ("FROM badtrigger", "", &["error failed to parse ONBUILD trigger \"NONSENSE x\""]),
        ("FROM scratch AS s\nFROM debian AS a\nONBUILD COPY --from=s /x /x\nFROM a", "", &["history +COPY /x /x # buildkit"]),
        ("FROM missing AS s\nFROM debian AS a\nONBUILD COPY --from=s /x /x\nFROM a", "", &["needs debian missing"]),
    ]);
}

#[test]
fn run() {
    table(&[
        (
            "FROM debian\nRUN echo hi",
            "",
            &[
                r#"op 1 /Exec/args ["/bin/sh","-c","echo hi"]"#,
                "history +RUN /bin/sh -c echo hi # buildkit",
                "name [2/2] RUN echo hi",
                r#"op 1 /Exec/hostname "buildkitsandbox""#,
                r#"op 1 /Exec/cwd "/""#,
            ],
        ),
        (
            "FROM debian\nrun [\"a\", \"b c\"]",
            "",
            &[r#"op 1 /Exec/args ["a","b c"]"#, "history +RUN a b c # buildkit", "name [2/2] RUN [\"a\", \"b c\"]"],
        ),
        ("FROM app\nRUN a", "", &[r#"op 1 /Exec/args ["/bin/bash","-ec","a"]"#, r#"op 1 /Exec/user "web""#, r#"op 1 /Exec/cwd "/app""#]),
        (
            "FROM debian\nRUN <<EOF\na\nb\nEOF",
            "",
            &[r#"op 1 /Exec/args ["/bin/sh","-c","a\nb\n"]"#, "name [2/2] RUN <<EOF (a...)", "op 1 /Exec/inline_files []"],
        ),
        (
            "FROM debian\nRUN <<EOF\n#!/bin/x\nb\nEOF",
            "",
            &[r##"op 1 /Exec/inline_files [["/dev/pipes/EOF","#!/bin/x\nb\n",493]]"##, "history +RUN /bin/sh -c /dev/pipes/EOF # buildkit"],
        ),
        ("FROM debian\nRUN <<EOF bash\na\nEOF", "", &[r#"op 1 /Exec/args/2 "<<EOF bash\na\nEOF""#, "name [2/2] RUN <<EOF bash"]),
        ("FROM debian\nRUN cat <<A <<B\na\nA\nb\nB", "", &[r#"op 1 /Exec/args/2 "cat <<A <<B\na\nA\nb\nB""#]),
        ("FROM debian\nARG A=1\nRUN echo $A $B", "", &["name [2/2] RUN echo 1 $B", "quiet"]),
        ("FROM debian\nRUN x", "hostname h; host a=1.2.3.4", &[r#"op 1 /Exec/hostname "h""#, r#"op 1 /Exec/hosts [["a","1.2.3.4"]]"#]),
        ("FROM debian\nRUN x", "arg BUILDKIT_SANDBOX_HOSTNAME=h", &[r#"op 1 /Exec/hostname "h""#, "quiet"]),
        (
            "FROM debian\nRUN --network=none x",
            "",
            &[r#"op 1 /Exec/network "None""#, "history +RUN /bin/sh -c x # buildkit", "name [2/2] RUN --network=none x"],
        ),
        ("FROM debian\nRUN --network=default x", "network none", &[r#"op 1 /Exec/network "None""#]),
        ("FROM debian\nRUN --network=host x", "", &["error entitlement network.host", "error --allow network.host"]),
        ("FROM debian\nRUN --network=host x", "allow network.host", &[r#"op 1 /Exec/network "Host""#]),
        ("FROM debian\nRUN --network=host x", "network host", &[r#"op 1 /Exec/network "Host""#]),
        ("FROM debian\nRUN --security=insecure x", "", &["error entitlement security.insecure"]),
        ("FROM debian\nRUN --security=insecure x", "allow security.insecure", &[r#"op 1 /Exec/security "Insecure""#]),
        ("FROM debian\nRUN --device=a.b/c x", "", &["error device: RUN --device=a.b/c cannot be honoured"]),
        ("FROM debian\nRUN []", "", &["error RUN has no command: the command is empty"]),
        ("FROM debian\nRUN [\"\", \"x\"]", "", &["error RUN has no command: the command is empty"]),
        ("FROM debian\nCMD []\nENTRYPOINT []", "", &["quiet"]),
    ]);
}

#[test]
fn mounts() {
    table(&[
        (
            "FROM debian\nWORKDIR /w\nRUN --mount=target=t x",
            "",
            &[
                r#"op -1 /Exec/mounts [{"target":"/w/t","kind":{"Bind":{"source":".","writable":false}}}]"#,
                "name [internal] load build context",
                "inputs -1 1 2",
            ],
        ),
        (
            "FROM debian\nRUN --mount=type=bind,target=/t,source=../a/b,rw x",
            "",
            &[r#"op 2 /Exec/mounts/0/kind/Bind {"source":"a/b","writable":true}"#, "inputs 2 0 1"],
        ),
        ("FROM debian AS a\nRUN y\nFROM debian\nRUN --mount=from=a,target=/t x", "", &["inputs 2 0 1"]),
        ("FROM debian\nRUN --mount=from=tool,target=/t x", "", &["rounds 1", "vertices 3"]),
        ("FROM debian\nRUN --mount=from=scratch,target=/t x", "", &["inputs 1 0"]),
        (
            "FROM debian\nRUN --mount=type=cache,target=/root/.cache/ x",
            "",
            &[
                r#"op 1 /Exec/mounts/0 {"target":"/root/.cache","kind":{"Cache":{"id":"/root/.cache","source":".","sharing":"shared","read_only":false,"mode":493,"uid":0,"gid":0}}}"#,
                "name [stage-0 2/2] RUN --mount=type=cache,target=/root/.cache/ x",
            ],
        ),
        (
            "FROM debian\nARG I=k\nRUN --mount=type=cache,id=$I,target=/c,uid=5,mode=0700,sharing=locked x",
            "arg BUILDKIT_CACHE_MOUNT_NS=ns",
            &[
                r#"op 1 /Exec/mounts/0/kind/Cache/id "ns/k""#,
                "op 1 /Exec/mounts/0/kind/Cache/uid 5",
                "op 1 /Exec/mounts/0/kind/Cache/mode 448",
                r#"op 1 /Exec/mounts/0/kind/Cache/sharing "locked""#,
                "history +RUN |1 I=k /bin/sh -c x # buildkit",
            ],
        ),
        ("FROM debian\nRUN --mount=type=tmpfs,target=/t x", "", &["op 1 /Exec/mounts/0/kind/Tmpfs/size null"]),
        (
            "FROM debian\nRUN --mount=type=secret,id=a x",
            "",
            &[
                r#"op 1 /Exec/mounts/0 {"target":"/run/secrets/a","kind":{"Secret":{"id":"a","env":null,"required":false,"mode":256,"uid":0,"gid":0}}}"#,
            ],
        ),
        (
            "FROM debian\nRUN --mount=type=secret,id=a,env=TOKEN echo $TOKEN",
            "",
            &[
                r#"op 1 /Exec/mounts/0/target """#,
                r#"op 1 /Exec/mounts/0/kind/Secret/env "TOKEN""#,
                "name [stage-0 2/2] RUN --mount=type=secret,id=a,env=TOKEN echo ****",
            ],
        ),
        (
            "FROM debian\nRUN --mount=type=ssh --mount=type=ssh,id=b x",
            "",
            &[
                r#"op 1 /Exec/mounts/0/target "/run/buildkit/ssh_agent.0""#,
                r#"op 1 /Exec/mounts/1 {"target":"/run/buildkit/ssh_agent.1","kind":{"Ssh":{"id":"b","required":false,"mode":384,"uid":0,"gid":0}}}"#,
            ],
        ),
        ("FROM debian\nRUN --mount=target=/ x", "", &["error invalid mount target \"/\""]),
        ("FROM debian\nRUN --mount=target=/t,uid=$NOPE,type=cache x", "", &["error mount: "]),
    ]);
}

#[test]
fn copies() {
    table(&[
        (
            "FROM scratch\nCOPY a b",
            "",
            &[
                r#"op 0 /Local/name "context""#,
                r#"op 1 /File {"actions":[{"Copy":{"sources":["a"],"dest":"/b","chown":null,"chmod":null,"parents":false,"excludes":[],"unpack":false,"keep_owner":false,"default_mode":null}}]}"#,
                "history +COPY a b # buildkit",
                "name [1/1] COPY a b",
            ],
        ),
        (
            "FROM scratch\nCOPY ../../a ./b/../c /d/",
            "",
            &[
                r#"op 1 /File/actions/0/Copy/sources ["a","c"]"#,
                r#"op 1 /File/actions/0/Copy/dest "/d/""#,
                "history +COPY ../../a ./b/../c /d/ # buildkit",
            ],
        ),
        (
            "FROM scratch\nWORKDIR /w\nCOPY . .",
            "",
            &[r#"op 2 /File/actions/0/Copy/sources ["."]"#, r#"op 2 /File/actions/0/Copy/dest "/w/""#],
        ),
        ("FROM scratch\nCOPY a b /c", "", &[r#"op 1 /File/actions/0/Copy/sources ["a","b"]"#, r#"op 1 /File/actions/0/Copy/dest "/c""#]),
        (
            "FROM scratch\nENV e=\nCOPY a $e",
            "",
            &[r#"op 1 /File/actions/0/Copy/dest "/""#, "history +COPY a  # buildkit", "name [1/1] COPY a "],
        ),
        (
            "FROM scratch\nARG U=1\nCOPY --chown=$U:g --chmod=0$U a*.go b",
            "",
            &[
                r#"op 1 /File/actions/0/Copy/chown "1:g""#,
                r#"op 1 /File/actions/0/Copy/chmod "01""#,
                r#"op 1 /File/actions/0/Copy/sources ["a*.go"]"#,
                "history +COPY --chown=1:g --chmod=01 a*.go b # buildkit",
            ],
        ),
        (
            "FROM scratch\nCOPY --chmod=9 a b",
            "",
            &["error invalid chmod parameter: '9'. it should be octal string and between 0 and 07777"],
        ),
        ("FROM scratch\nCOPY --chmod=u=rwX,go-w a b", "", &[r#"op 1 /File/actions/0/Copy/chmod "u=rwX,go-w""#]),
        (
            "FROM debian\nCOPY --link a b",
            "",
            &["inputs 2 1", "inputs 3 0 2", "name [2/2] LINK COPY --link a b", "name [2/2] COPY --link a b"],
        ),
        ("FROM debian\nCOPY --link --chmod=755 a b", "", &["inputs 2 0 1"]),
        (
            "FROM scratch\nCOPY --parents --exclude=*.md x/./y/z /d/",
            "",
            &[
                r#"op 1 /File/actions/0/Copy/sources ["x/./y/z"]"#,
                "op 1 /File/actions/0/Copy/parents true",
                r#"op 1 /File/actions/0/Copy/excludes ["*.md"]"#,
                "history +COPY --parents x/./y/z /d/ # buildkit",
            ],
        ),
        (
            "FROM scratch\nCOPY [\"a b\", \"c d\"]",
            "",
            &[r#"op 1 /File/actions/0/Copy/sources ["a b"]"#, "history +COPY a b c d # buildkit"],
        ),
        (
            "FROM scratch\nENV N=x\nCOPY <<EOF <<\"RAW\" /d/\n'$N' \\$N\nEOF\n$N\nRAW",
            "",
            &[
                r#"op 0 /File/actions/0/Inline/content "'x' $N\n""#,
                r#"op 0 /File/actions/1/Inline {"name":"RAW","content":"$N\n","dest":"/d/","chown":null,"chmod":null}"#,
                "history +COPY <<EOF <<RAW /d/ # buildkit",
            ],
        ),
        ("FROM scratch\nCOPY --from=$X a b", "", &["error variable expansion is not supported for --from"]),
        ("FROM scratch\nCOPY https://a.example/x /x", "", &["error source can't be a URL for COPY"]),
        ("FROM scratch\nCOPY git@a.example:b/c /x", "", &["error source can't be a git ref for COPY"]),
        ("FROM scratch\nADD a.tar /x/", "", &["op 1 /File/actions/0/Copy/unpack true", "history +ADD a.tar /x/ # buildkit"]),
        ("FROM scratch\nADD --unpack=false a.tar /x/", "", &["op 1 /File/actions/0/Copy/unpack false"]),
        (
            "FROM scratch\nADD https://a.example/f.tar?x /d/",
            "",
            &[
                r#"op 0 /Http {"url":"https://a.example/f.tar?x","filename":"f.tar","checksum":null}"#,
                "op 1 /File/actions/0/Copy/default_mode 384",
                r#"op 1 /File/actions/0/Copy/sources ["f.tar"]"#,
                "op 1 /File/actions/0/Copy/unpack false",
            ],
        ),
        (
            "FROM scratch\nADD --unpack=true --checksum=sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855 https://a.example/f /d",
            "",
            &[
                "op 1 /File/actions/0/Copy/unpack true",
                r#"op 0 /Http/checksum "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855""#,
            ],
        ),
        ("FROM scratch\nADD --checksum=sha256:zz https://a.example/f /d", "", &["error sha256:zz"]),
        ("FROM scratch\nADD --checksum=sha256:zz f /d", "", &["error checksum requires HTTP(S) or Git sources"]),
        (
            "FROM scratch\nADD --checksum=abc https://a.example/f https://a.example/g /d/",
            "",
            &["error checksum can't be specified for multiple sources"],
        ),
        (
            "FROM scratch\nADD --keep-git-dir=true https://a.example/r.git#v1:sub /d",
            "",
            &[
                r#"op 0 /Git {"url":"https://a.example/r.git","reference":"v1","subdir":"sub","keep_git_dir":true,"checksum":null,"submodules":true}"#,
                r#"op 1 /File/actions/0/Copy/sources ["."]"#,
                "name [1/1] ADD --keep-git-dir=true https://a.example/r.git#v1:sub /d",
            ],
        ),
        (
            "FROM scratch\nADD git@a.example:r.git?branch=main&submodules=0 /d",
            "",
            &[r#"op 0 /Git/reference "refs/heads/main""#, "op 0 /Git/submodules false"],
        ),
        (
            "FROM scratch\nADD --checksum=abcd https://a.example/r.git?checksum=abce /d",
            "",
            &["error checksum mismatch \"abcd\" != \"abce\""],
        ),
        (
            "FROM scratch\nADD --keep-git-dir=false https://a.example/r.git?keep-git-dir=true /d",
            "",
            &["error inconsistent keep-git-dir configuration"],
        ),
        ("FROM scratch\nADD https://me:pw@a.example/r.git /d", "", &["error the URL holds a user or password"]),
        (
            "FROM scratch\nADD a https://a.example/f b /d/",
            "",
            &[r#"op -1 /File/actions/2/Copy/sources ["b"]"#, r#"op -1 /File/actions/1/Copy/sources ["f"]"#],
        ),
    ]);
}

#[test]
fn named_contexts() {
    table(&[
        ("FROM debian", "context debian=docker-image://app", &["name [context debian] app", r#"config /config/Cmd ["serve"]"#, "rounds 1"]),
        ("FROM docker.io/library/debian:latest", "context debian=docker-image://app", &[r#"config /config/Cmd ["serve"]"#]),
        ("FROM debian", "context docker.io/library/debian:latest=docker-image://app", &[r#"config /config/Cmd ["serve"]"#]),
        ("FROM debian:12", "context debian=docker-image://app", &[r#"config /config/Cmd ["bash"]"#]),
        (
            "FROM missing AS base\nRUN x\nFROM base\nCOPY a /a",
            "context base=docker-image://app",
            &["vertices 3", "histories 1", r#"config /config/Cmd ["serve"]"#],
        ),
        (
            "FROM scratch\nCOPY --from=src a /a",
            "context src=local",
            &[r#"op 0 /Local/name "src""#, "name [context src] load from client", "op 1 /File/actions/0/Copy/keep_owner false"],
        ),
        ("FROM debian\nRUN --mount=from=src,target=/s x", "context src=local", &["inputs 2 0 1"]),
        ("FROM src\nCOPY a /a", "context src=local", &["histories 2", r#"op 1 /File/actions/0/Copy/sources ["."]"#, SCRATCH_ENV]),
        ("FROM scratch AS src\nFROM scratch\nCOPY --from=src a /a", "context src=docker-image://debian", &["vertices 2"]),
        ("FROM scratch\nCOPY --from=x a /a", "context x=docker-image://scratch", &["op 0 /File/actions []"]),
        ("FROM debian", "context debian::linux/amd64=docker-image://app", &[r#"config /config/Cmd ["serve"]"#]),
        ("FROM debian", "context debian::linux/arm64=docker-image://app", &[r#"config /config/Cmd ["bash"]"#]),
        ("FROM scratch AS a\nLABEL x=1\nFROM b", "context b=target:a", &[r#"config /config/Labels/x "1""#]),
        ("FROM scratch AS a\nCOPY x /x\nFROM scratch\nCOPY --from=b /x /y", "context b=target:a", &["inputs 2 1"]),
        (
            "FROM scratch AS a\nLABEL x=1\nFROM missing AS b\nRUN y\nFROM b",
            "context b=target:a",
            &[r#"config /config/Labels/x "1""#, "vertices 0"],
        ),
        ("FROM b\nFROM scratch AS a", "context b=target:a; target 0", &["error must stand before its use"]),
        ("FROM b", "context b=target:nope", &["error target stage \"nope\" could not be found"]),
        ("FROM scratch\nCOPY --from=b x /x", "context b=target:nope", &["error target stage \"nope\" could not be found"]),
        ("FROM scratch", "context scratch=docker-image://debian", &["vertices 0"]),
        ("FROM debian", "context debian=oci-layout:///x", &["needs oci-layout:///x"]),
    ]);
}

#[test]
fn checks() {
    table(&[
        ("FROM scratch as a", "", &["warning FromAsCasing: "]),
        ("# check=skip=FromAsCasing\nFROM scratch as a", "", &["quiet"]),
        (
            "# check=skip=all\nFROM scratch as a",
            "arg BUILDKIT_DOCKERFILE_CHECK=error=true",
            &["error lint violation found for rules: FromAsCasing"],
        ),
        (
            "# check=error=true\nFROM scratch as a\nENV A=$NOPE",
            "",
            &["error rules: FromAsCasing, UndefinedVar", "warning FromAsCasing", "warning UndefinedVar"],
        ),
        ("# check=skip=FromAsCasing;error=true\nFROM scratch as a", "", &["quiet"]),
        ("FROM scratch AS a\nCMD x\nFROM scratch", "", &["quiet"]),
        ("FROM scratch AS a\nCMD x\nFROM a", "", &["warning JSONArgsRecommended"]),
        (
            "FROM scratch as a\nFROM nope:$X",
            "arg BUILDKIT_DOCKERFILE_CHECK=skip=UndefinedArgInFrom",
            &["error failed to parse stage name", "warning FromAsCasing"],
        ),
        (
            "FROM scratch\n# check=skip=UndefinedVar\nENV A=$NOPE\nENV B=$NOPE",
            "",
            &["warning UndefinedVar: Usage of undefined variable '$NOPE'"],
        ),
        ("FROM scratch\n# check=skip=UndefinedVar\nENV A=$NOPE", "", &["quiet"]),
        ("FROM scratch", "arg BUILDKIT_DOCKERFILE_CHECK=nonsense", &["error invalid-check"]),
    ]);
}

#[test]
fn hostile_files_end_with_an_error() {
    let doubling = (0..60).fold(String::from("FROM scratch\nENV A=xxxxxxxxxxxxxxxx\n"), |text, _| text + "ENV A=$A$A\n");
    assert!(!see(&doubling, "").errors.is_empty());
    let many: String = (0..200).fold(String::from("FROM scratch\nARG A=xxxxxxxx\n"), |text, i| text + &format!("ARG B{i}=$A$A$A$A\n"));
    assert!(see(&many, "").errors.is_empty());
    let chain: String = (0..3000)
        .fold(String::from("FROM scratch AS s0\n"), |text, i| text + &format!("FROM scratch AS s{}\nCOPY --from=s{i} / /\n", i + 1));
    assert!(see(&chain, "").plan.is_some());
    let heavy: String =
        (0..2000).fold(String::from("FROM scratch AS s0\nEXPOSE 1-65535\n"), |text, i| text + &format!("FROM s{i} AS s{}\n", i + 1));
    assert!(see(&heavy, "").errors.iter().any(|e| e.contains("expand to more than")));
    let names = format!("FROM debian\nENV A={}\n{}", "x".repeat(1 << 20), "RUN x\n".repeat(100));
    assert!(see(&names, "").errors.iter().any(|e| e.contains("expand to more than")));
    let warnings = format!("FROM scratch\n{}", (0..5000).fold(String::new(), |text, i| text + &format!("ENV A=$N{i}\n")));
    assert_eq!(see(&warnings, "").warnings.len(), 1000);
    let ports = format!("FROM scratch\nEXPOSE {}", "1-65535 ".repeat(1000));
    assert!(see(&ports, "").errors.iter().any(|e| e.contains("ports in one EXPOSE")));
    assert!(lower(&parse("# nothing\n").dockerfile, "# nothing\n", &options(""), &Images::new()).is_err());
}

proptest::proptest! {
    /// Any file made of pieces of instructions gives a plan, needs, or errors, and the same twice.
    #[test]
    fn never_panics(lines in proptest::collection::vec((
        proptest::sample::select(vec!["FROM", "ARG", "ENV", "COPY", "ADD", "RUN", "WORKDIR", "EXPOSE", "LABEL", "HEALTHCHECK", "ONBUILD RUN", "USER", "CMD", "VOLUME"]),
        proptest::collection::vec(proptest::sample::select(vec![
            "a", "b", "scratch", "AS", "a=$b", "${a", "$a$a", "--from=a", "--from=0", "--mount=from=a,target=/x", "<<EOF", "\nEOF", "/", "..", "1-9", "[\"a\"", "]", "\\", "'", "\"",
            "--link", "https://x/y.git#z:w", "a@b:c", "é", "CMD", "--interval=1s", "debian", "=",
        ]), 0..5),
    ), 0..12)) {
        let text: String = lines.iter().fold(String::new(), |text, (name, words)| text + name + " " + &words.join(" ") + "\n");
        let parsed = parse(&text);
        let mut images = Images::new();
        for options_text in ["", "target a; arg a=1; context b=local"] {
            let options = options(options_text);
            for _ in 0..3 {
                let first = lower(&parsed.dockerfile, &text, &options, &images);
                proptest::prop_assert_eq!(&first, &lower(&parsed.dockerfile, &text, &options, &images));
                match first {
                    Ok(Lowered::Needs(needs)) => images.extend(needs.into_iter().filter_map(|need| Some((need.clone(), resolve(&need)?)))),
                    Ok(Lowered::Done(plan, _)) => { check_invariants(&text, &plan); break; }
                    Err(_) => break,
                }
            }
        }
    }
}
