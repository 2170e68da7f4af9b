//! A remotecommand session over WebSocket, in every protocol: it ends with its client, and the process
//! reads the same however the bytes come.

#![no_main]

use libfuzzer_sys::fuzz_target;
use std::time::Duration;

const PROTOCOLS: [&str; 3] = ["v5.channel.k8s.io", "channel.k8s.io", "v4.base64.channel.k8s.io"];

thread_local! {
    static RUNTIME: tokio::runtime::Runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
}

fuzz_target!(|input: (u8, &[u8])| {
    let (choice, bytes) = input;
    let protocol = PROTOCOLS[usize::from(choice) % PROTOCOLS.len()];
    let room = 1 + usize::from(choice);
    let read = |room| {
        RUNTIME.with(|runtime| {
            runtime.block_on(async {
                let session = a3s_box_streaming::fuzz::websocket(protocol, bytes, room);
                let read = tokio::time::timeout(Duration::from_secs(3600), session).await;
                read.expect("the session ends with its client")
            })
        })
    };
    let whole = read(1 << 16);
    assert!(whole.len() <= bytes.len());
    assert_eq!(whole, read(room));
});
