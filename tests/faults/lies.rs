//! A worker that lies (the token of an attempt that is over, one that nobody has, another version of the protocol) is refused,
//! and the job goes on as if it had said nothing.

use serde_json::json;

use lorad::types::worker_protocol::VERSION;

use super::support::{Home, rows};

/// Tells lies, notes the answers, and then becomes an honest worker.
const LIAR: &str = r#"#!/bin/sh
IFS= read -r token
tell() {
    curl -s -o /dev/null -w "$1 %{http_code}\n" --unix-socket 'DATA/worker.sock' -H "authorization: Bearer $2" \
        -H "lorad-worker-protocol: $3" -H 'content-type: application/json' -d "$5" "http://worker/internal/v1/worker/$4" \
        >>'DATA/answers'
}
end='{"result": "failed", "code": "lie", "message": "a lie"}'
if [ -f 'DATA/old' ]; then
    old=$(cat 'DATA/old')
    tell old "$old" VERSION finish "$end"
    tell old "$old" VERSION heartbeat '{}'
fi
tell nobody 0000 VERSION finish "$end"
tell version "$token" 0 finish "$end"
printf '%s' "$token" >'DATA/old'
exec 'LORAD' "$@" <<EOF
$token
EOF
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_lies_is_refused() {
    let run = json!({"training": {"max_steps": 20, "learning_rate": 0.01}, "lora": {"r": 4}});
    let honest = Home::start(&[]).await;
    let liar = Home::start_with_worker(&LIAR.replace("VERSION", VERSION)).await;
    let mut artifacts = Vec::new();
    for home in [&honest, &liar] {
        let file = home.upload(rows(40)).await;
        let id = home.create(&file, run.clone()).await;
        let job = home.finished(&id).await;
        assert_eq!(job["status"], "succeeded", "{job}");
        artifacts.push(home.artifacts(&id).await);
    }
    assert_eq!(artifacts[0], artifacts[1]);
    // Of the validation, then of the training, to which the validation's token is old.
    let answers = ["nobody 401", "version 400", "old 410", "old 410", "nobody 401", "version 400"];
    assert_eq!(liar.data_file("answers").lines().collect::<Vec<_>>(), answers);
    assert_eq!(liar.attempts(), 2);
}
