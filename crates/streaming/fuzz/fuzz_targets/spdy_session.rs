//! A whole session: whatever its client says, it ends when the client goes.

#![no_main]

use libfuzzer_sys::fuzz_target;
use std::time::Duration;

thread_local! {
    static RUNTIME: tokio::runtime::Runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
}

// Time stands still unless everybody waits: then the session hangs.
fuzz_target!(|bytes: &[u8]| {
    RUNTIME.with(|runtime| {
        runtime.block_on(async {
            let session = a3s_box_streaming::fuzz::spdy(bytes, 1 << 16);
            let all = tokio::time::timeout(Duration::from_secs(3600), session).await;
            let all = all.expect("the session ends with its client");
            assert!(all.iter().map(|(_, read)| read.len()).sum::<usize>() <= bytes.len());
        });
    });
});
