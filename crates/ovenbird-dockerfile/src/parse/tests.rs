#[path = "throwaway.rs"]
mod throwaway;
