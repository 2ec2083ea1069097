// What the widget says, in each language that it speaks. {name} is replaced.

const STRINGS = {
  en: {
    open: "Chat with us", close: "Close the chat", message: "Your message", write: "Write a message", send: "Send",
    stop: "Stop", person: "Talk to a person", bot: "Back to the assistant", assistant: "AI assistant", you: "You",
    waiting: "A person will join soon", joined: "{name} has joined", back: "The assistant answers again",
    asked: "A person has been called", resolved: "This conversation is closed. Write to open it again.",
    offline: "Connecting again …", writing: "The assistant is writing", helpful: "Helpful", unhelpful: "Not helpful",
    why: "What was wrong?", sendReason: "Send", thanks: "Thank you.", sources: "Sources", stopped: "Stopped",
    sending: "Sending …", failed: "This could not be done: {name}", log: "Conversation", skip: "No reason",
    step: "Step {name}", choices: "Answers to choose from",
    consents: "What we ask you", agreed: "Noted: you agree.", withdrawn: "Noted: you do not agree.",
  },
  de: {
    open: "Chat öffnen", close: "Chat schließen", message: "Ihre Nachricht", write: "Nachricht schreiben",
    send: "Senden", stop: "Anhalten", person: "Mit einem Menschen sprechen", bot: "Zurück zum Assistenten",
    assistant: "KI-Assistent", you: "Sie", waiting: "Gleich ist ein Mensch für Sie da",
    joined: "{name} ist jetzt im Gespräch", back: "Der Assistent antwortet wieder", asked: "Ein Mensch wurde gerufen",
    resolved: "Dieses Gespräch ist beendet. Schreiben Sie, um es wieder zu öffnen.",
    offline: "Verbindung wird wiederhergestellt …", writing: "Der Assistent schreibt", helpful: "Hilfreich",
    unhelpful: "Nicht hilfreich", why: "Was war falsch?", sendReason: "Senden", thanks: "Danke.", sources: "Quellen",
    stopped: "Angehalten", sending: "Wird gesendet …", failed: "Das ging nicht: {name}", log: "Gespräch",
    skip: "Ohne Grund",
    step: "Schritt {name}", choices: "Antworten zur Auswahl",
    consents: "Worum wir Sie bitten", agreed: "Notiert: Sie stimmen zu.", withdrawn: "Notiert: Sie stimmen nicht zu.",
  },
  fr: {
    open: "Discuter avec nous", close: "Fermer la discussion", message: "Votre message", write: "Écrire un message",
    send: "Envoyer", stop: "Arrêter", person: "Parler à une personne", bot: "Revenir à l’assistant",
    assistant: "Assistant IA", you: "Vous", waiting: "Une personne va bientôt vous répondre",
    joined: "{name} a rejoint la conversation", back: "L’assistant répond à nouveau",
    asked: "Une personne a été appelée", resolved: "Cette conversation est close. Écrivez pour la rouvrir.",
    offline: "Reconnexion …", writing: "L’assistant écrit", helpful: "Utile", unhelpful: "Pas utile",
    why: "Qu’est-ce qui n’allait pas ?", sendReason: "Envoyer", thanks: "Merci.", sources: "Sources",
    stopped: "Arrêté", sending: "Envoi …", failed: "Cela n’a pas marché : {name}", log: "Conversation",
    skip: "Sans raison",
    step: "Étape {name}", choices: "Réponses au choix",
    consents: "Ce que nous vous demandons", agreed: "C’est noté : vous acceptez.", withdrawn: "C’est noté : vous n’acceptez pas.",
  },
  es: {
    open: "Hable con nosotros", close: "Cerrar el chat", message: "Su mensaje", write: "Escriba un mensaje",
    send: "Enviar", stop: "Parar", person: "Hablar con una persona", bot: "Volver al asistente",
    assistant: "Asistente de IA", you: "Usted", waiting: "Una persona le atenderá pronto",
    joined: "{name} se ha unido", back: "El asistente vuelve a responder", asked: "Se ha llamado a una persona",
    resolved: "Esta conversación está cerrada. Escriba para abrirla de nuevo.", offline: "Reconectando …",
    writing: "El asistente está escribiendo", helpful: "Útil", unhelpful: "No es útil", why: "¿Qué estuvo mal?",
    sendReason: "Enviar", thanks: "Gracias.", sources: "Fuentes", stopped: "Detenido", sending: "Enviando …",
    failed: "No se pudo hacer: {name}", log: "Conversación", skip: "Sin motivo",
    step: "Paso {name}", choices: "Respuestas para elegir",
    consents: "Lo que le pedimos", agreed: "Anotado: usted acepta.", withdrawn: "Anotado: usted no acepta.",
  },
  ar: {
    open: "تحدث معنا", close: "إغلاق المحادثة", message: "رسالتك", write: "اكتب رسالة", send: "إرسال", stop: "إيقاف",
    person: "التحدث إلى شخص", bot: "العودة إلى المساعد", assistant: "مساعد ذكاء اصطناعي", you: "أنت",
    waiting: "سينضم إليك شخص قريبًا", joined: "انضم {name}", back: "المساعد يجيب من جديد", asked: "تم استدعاء شخص",
    resolved: "هذه المحادثة مغلقة. اكتب لفتحها من جديد.", offline: "جارٍ إعادة الاتصال …",
    writing: "المساعد يكتب", helpful: "مفيد", unhelpful: "غير مفيد", why: "ما الخطأ؟", sendReason: "إرسال",
    thanks: "شكرًا.", sources: "المصادر", stopped: "توقف", sending: "جارٍ الإرسال …", failed: "تعذر ذلك: {name}",
    log: "المحادثة", skip: "بدون سبب",
    step: "الخطوة {name}", choices: "إجابات للاختيار",
    consents: "ما نطلبه منك", agreed: "تم التسجيل: أنت موافق.", withdrawn: "تم التسجيل: أنت غير موافق.",
  },
};
const RIGHT_TO_LEFT = ["ar", "he", "fa", "ur"];

/** `say(key, name)`, the language and its direction; of the first of `wanted` that there is, else English. */
export function speak(...wanted) {
  const language = wanted.map((w) => w?.split("-")[0].toLowerCase()).find((w) => w in STRINGS) ?? "en";
  const say = (key, name = "") => STRINGS[language][key].replace("{name}", () => name);
  return { say, language, direction: RIGHT_TO_LEFT.includes(language) ? "rtl" : "ltr" };
}
