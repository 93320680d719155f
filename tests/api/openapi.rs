//! The specification: committed, served, complete.

use crate::support::TestApp;

#[test]
fn committed_specification_is_the_one_of_the_code() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.yaml");
    let committed = std::fs::read_to_string(path).expect("openapi.yaml is committed");
    let generated = lorad::http::openapi::specification_yaml().expect("YAML");
    assert!(committed == generated, "openapi.yaml is out of date: run `cargo run --release -- openapi > openapi.yaml`");
}

#[tokio::test]
async fn specification_is_served_in_both_forms() {
    let app = TestApp::start().await;
    let json = app.get_json("/openapi.json").await;
    assert_eq!(json["openapi"].as_str().map(|version| &version[..2]), Some("3."));
    for path in ["/v1/files", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/events", "/v1/artifacts/{artifact_id}/content"]
    {
        assert!(json["paths"][path].is_object(), "{path}");
    }
    // Words as the API spells them, not as the code names its variants.
    let words = |name: &str| json["components"]["schemas"][name]["enum"].clone();
    assert_eq!(words("ArtifactType"), serde_json::json!(["adapter", "gguf", "gguf_lora", "merged", "ollama"]));
    assert_eq!(words("Quantization")[8], "q4_k_m");
    let yaml = app.get("/openapi.yaml").await.text().await.expect("a body");
    assert_eq!(yaml, lorad::http::openapi::specification_yaml().expect("YAML"));
}
