//! Ctrl-C and SIGTERM: the first stops the work in order, the second ends the process.

use ovenbird_engine::Cancel;
use tokio::signal::unix::{SignalKind, signal};

/// Watches from a thread of its own; call it after the isolation level was entered.
pub(crate) fn watch(cancel: &Cancel) {
    let cancel = cancel.clone();
    let watcher = move || {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_io().build() else { return };
        runtime.block_on(async {
            let kinds = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()), signal(SignalKind::hangup()));
            let (Ok(mut interrupt), Ok(mut terminate), Ok(mut hangup)) = kinds else { return };
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                    _ = hangup.recv() => {}
                }
                if cancel.is_cancelled() {
                    // Steps die with the threads that wait for them, mounts with their namespaces.
                    std::process::exit(i32::from(ovenbird::Kind::Cancelled.exit_code()));
                }
                cancel.cancel();
            }
        });
    };
    // Without the thread the signals keep their default: they end the process.
    let _ = std::thread::Builder::new().name("signals".into()).spawn(watcher);
}
